"""Adaptive braking: a heavy-ball outer optimiser that heeds whether a late gradient points along its velocity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from decentral.protocols.outer import OUTERS, Outer


class AdaptiveBraking(Outer):
    """Strengthens outer gradients that point against the velocity and weakens those that point along it.

        a = 1 - rho <g, v> / (|g| |v|), tensor by tensor;   v <- mu v + a g;   anchor <- anchor - eta v

    Venigalla et al., arXiv 2007.01397, from memory of the paper, which takes a for each row of a matrix. It allows
    larger steps where gradients are late, and smaller ones where they are not, so it brakes only from a staleness of
    `late` updates on, as measured by a rule with a server; elsewhere, as with rho = 0, it is heavy ball. With rho > 1
    an aligned gradient would count negatively: a is at least 0 unless `clamp` is false, as in the paper.
    """

    name = "adaptive_braking"
    lr: float = Field(default=0.7, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """mu."""
    rho: float = Field(default=2.0, ge=0)
    """How strongly alignment counts."""
    late: float = Field(default=1.0, ge=0)
    """Staleness in updates from which on it brakes."""
    clamp: bool = True
    """Let no gradient count negatively."""
    _sizes: tuple[int, ...] = PrivateAttr(())
    _staleness: float = PrivateAttr(0.0)

    def fit(self, sizes: Sequence[int]) -> AdaptiveBraking:
        fitted = self.model_copy()
        fitted._sizes = tuple(sizes)
        return fitted

    def delayed(self, staleness: float) -> AdaptiveBraking:
        delayed = self.model_copy()
        delayed._staleness = staleness
        return delayed

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        braked = gradient
        if self._staleness >= self.late and isinstance(gradient, Tensor):  # phantoms have no direction
            sizes = list(self._sizes) or [gradient.numel()]
            pairs = zip(torch.split(gradient, sizes), torch.split(momentum, sizes), strict=True)
            braked = torch.cat([each * self._factor(each, velocity) for each, velocity in pairs])
        momentum.mul_(self.momentum).add_(braked)
        anchor.sub_(momentum, alpha=self.lr)

    def _factor(self, gradient: Tensor, velocity: Tensor) -> float:
        lengths = float(torch.linalg.vector_norm(gradient)) * float(torch.linalg.vector_norm(velocity))
        factor = 1 - self.rho * float(gradient @ velocity) / lengths if lengths else 1.0
        return max(0.0, factor) if self.clamp else factor


OUTERS[AdaptiveBraking.name] = AdaptiveBraking
