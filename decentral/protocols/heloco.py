"""HeLoCo: an outer optimiser that bends stale outer gradients towards the momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from decentral.protocols.outer import OUTERS, Outer
from decentral.protocols.robust import inner_products


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
        products = inner_products([gradient, momentum])
        length, usual = products.diagonal().sqrt().tolist()
        if length == 0 or usual == 0:
            return gradient
        # Who sums in another order must come to the same replica: what sums decide is rounded.
        cosine, ratio = round(float(products[0, 1]) / (length * usual), 7), float(f"{length / usual:.7g}")
        if cosine >= self.agree:
            return gradient
        if cosine < 0:
            return gradient.sub(momentum, alpha=cosine * ratio)
        share = ((1 - self.agree**2) / (1 - cosine**2)) ** 0.5  # of what lies across the momentum
        return gradient.mul(share).add_(momentum, alpha=ratio * (self.agree - cosine * share))


OUTERS[HeLoCo.name] = HeLoCo
