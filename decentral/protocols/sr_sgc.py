"""Gradient coding over several rounds, in which work that did not come may be done again: SR-SGC."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from decentral.errors import ConfigError
from decentral.protocols.gradient_coding import GradientCoding
from decentral.protocols.server import Server


class SequentialCoding(GradientCoding):
    """Gradient coding for stragglers that come and go.

    Of them at most lambda are distinct in any W rounds, and none is one for longer than B rounds: the bursty model of
    "Sequential Gradient Coding" (arXiv 2211.13802). A round lasts 1 + mu times as long as its quickest worker takes,
    and longer where the sum that is due still lacks pushes, so stragglers of any pattern cost time and never a wrong
    sum. There other models are trained until a gradient has come; here gradients are late. A worker that is late is not
    interrupted: it delivers what it has.
    """

    burst: int = Field(default=1, ge=1)
    """Rounds in a row for which a worker may be a straggler (B)."""
    window: int = Field(default=3, ge=2)
    """Rounds that the model of stragglers looks at (W)."""
    stragglers: int = Field(default=1, ge=0)
    """Distinct stragglers in a window (lambda)."""
    slack: float = Field(default=1.0, ge=0)
    """How much longer than its quickest worker takes a round lasts, as a share (mu)."""

    @property
    def wait(self) -> float:
        return self.slack


class SRSGC(SequentialCoding):
    """Gradient coding in which a job may be done again: few workers need to be coded for if stragglers come and go.

        s = ceil(B lambda / (W - 1 + B));   round t: if v > s workers have not delivered job t - B, v - s of them do it
        again instead of job t;   model_(t+1) <- outer(model_t, mean gradient at model_(t-B))

    The scheme SR-SGC of arXiv 2211.13802, from its authors' simulator. B divides W - 1.
    """

    name = "sr_sgc"

    @property
    def delay(self) -> int:
        return self.burst

    def tolerated(self, workers: int) -> int:
        return math.ceil(self.burst * self.stragglers / (self.window - 1 + self.burst))

    def check(self, workers: int) -> None:
        super().check(workers)
        if (self.window - 1) % self.burst:
            raise ConfigError(f"rule.burst: {self.burst} does not divide window - 1 = {self.window - 1}")

    def assign(self, server: Server, jobs: dict[int, Any], worker: int) -> None:
        """Send a worker out: to do a job again whose sum is due and lacks pushes, or for the round's own job."""
        number = self.next_assignment(server, worker)
        due = jobs.get(number - self.delay)
        if due is not None and worker not in due.came:
            coming = sum(assigned == number - self.delay for assigned in server.assigned.values())
            if len(due.came) + coming < len(server.peer.cohort) - self.tolerated(len(server.peer.cohort)):
                server.dispatch(worker, number - self.delay, due.model)
                return
        server.dispatch(worker, number)
