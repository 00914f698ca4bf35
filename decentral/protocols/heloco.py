"""HeLoCo: an outer optimiser that bends stale outer gradients towards the momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from decentral.protocols.merge import OUTERS, Outer


class HeLoCo(Outer):
    """Corrects an outer gradient that points elsewhere than the momentum, tensor by tensor, then takes a Nesterov step.

        g <- corrected(g, b);   b <- mu b + (1 - mu) g;   anchor <- anchor - eta (g + mu b)

    With c = cos(g, b): for c >= `agree` g is kept; for 0 <= c < `agree` it is turned in the plane of g and b until
    c = `agree`, its length kept; for c < 0 it loses what points against b. A zero g or b changes nothing. HeLoCo (arXiv
    2606.00271) as a one-sentence note has it: the angle to which to turn and how much to shrink are chosen here. For
    rules whose outer gradients are late. A rule that does not `fit` it has the whole vector taken for one tensor.
    """

    name = "heloco"
    lr: float = Field(default=0.7, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """mu."""
    agree: float = Field(default=0.5, ge=0, lt=1)
    """Cosine from which on a gradient is taken as it is (c_ok)."""
    _sizes: tuple[int, ...] = PrivateAttr(())

    def fit(self, sizes: Sequence[int]) -> HeLoCo:
        fitted = self.model_copy()
        fitted._sizes = tuple(sizes)
        return fitted

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        if isinstance(gradient, Tensor):  # phantoms have no direction
            sizes = self._sizes or (gradient.numel(),)
            pairs = zip(torch.split(gradient, list(sizes)), torch.split(momentum, list(sizes)), strict=True)
            gradient = torch.cat([self._corrected(of_gradient, of_momentum) for of_gradient, of_momentum in pairs])
        momentum.mul_(self.momentum).add_(gradient, alpha=1 - self.momentum)
        anchor.sub_(gradient, alpha=self.lr).sub_(momentum, alpha=self.lr * self.momentum)

    def _corrected(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        length, usual = (float(torch.linalg.vector_norm(each)) for each in (gradient, momentum))
        if length == 0 or usual == 0:
            return gradient
        along = momentum / usual
        cosine = float(along @ gradient) / length
        if cosine >= self.agree:
            return gradient
        across = gradient - cosine * length * along
        if cosine < 0:
            return across
        sine = (1 - self.agree**2) ** 0.5
        return along.mul_(length * self.agree).add_(
            across, alpha=length * sine / float(torch.linalg.vector_norm(across))
        )


OUTERS[HeLoCo.name] = HeLoCo
