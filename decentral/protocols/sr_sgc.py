"""SR-SGC: gradient coding over several rounds, in which work that did not come may be done again."""

from __future__ import annotations

import math

from pydantic import Field

from decentral.errors import ConfigError
from decentral.protocols.gradient_coding import GradientCoding


class SRSGC(GradientCoding):
    """Gradient coding in which a job may be done again: few workers need to be coded for if stragglers come and go.

        s = ceil(B lambda / (W - 1 + B));   round t: if v > s workers have not delivered job t - B, v - s of them do it
        again instead of job t;   model_(t+1) <- outer(model_t, mean gradient at model_(t-B))

    The scheme SR-SGC of "Sequential Gradient Coding" (arXiv 2211.13802), from its authors' simulator: made for
    stragglers of whom at most lambda are distinct in any W rounds and none is one for longer than B rounds, with B a
    divisor of W - 1. A round lasts 1 + mu times as long as its quickest worker takes, and longer where the sum that is
    due still lacks pushes, so stragglers of any pattern cost time and never a wrong sum. There other models are trained
    in the meantime; here gradients are B updates old. A worker that is late is not interrupted: it delivers the job
    that it has.
    """

    name = "sr_sgc"
    burst: int = Field(default=1, ge=1)
    """Rounds in a row for which a worker may be a straggler (B)."""
    window: int = Field(default=3, ge=2)
    """Rounds that the model of stragglers looks at (W)."""
    stragglers: int = Field(default=1, ge=0)
    """Distinct stragglers in a window (lambda)."""
    slack: float = Field(default=1.0, ge=0)
    """How much longer than its quickest worker takes a round lasts, as a share (mu)."""

    @property
    def delay(self) -> int:
        return self.burst

    @property
    def wait(self) -> float:
        return self.slack

    def tolerated(self, workers: int) -> int:
        return math.ceil(self.burst * self.stragglers / (self.window - 1 + self.burst))

    def check(self, workers: int) -> None:
        super().check(workers)
        if (self.window - 1) % self.burst:
            raise ConfigError(f"rule.burst: {self.burst} does not divide window - 1 = {self.window - 1}")
