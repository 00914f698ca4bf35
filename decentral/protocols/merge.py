"""How it is merged: means, and what an outer optimiser makes of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.part import Part
from decentral.protocols.naming import part_named

CANCELLED = 1e-6
"""A mean of unit vectors that is shorter than this is rounding and has no direction."""


def mean(contributions: Sequence[Tensor]) -> Tensor:
    """Return the mean of the contributions, summed in the order given (ascending workers), in float32."""
    if len(contributions) == 1:
        return contributions[0].clone()
    total = contributions[0] + contributions[1]  # the first copy is the first sum: a pass over memory less
    for contribution in contributions[2:]:
        total = total.add_(contribution)
    return total.div_(len(contributions))


def weighted_mean(contributions: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    """Return sum_i w_i x_i / sum_i w_i, summed in the order given; the same bits as `mean` if all weights are equal."""
    if len(set(weights)) == 1:
        return mean(contributions)
    total = contributions[0] * float(weights[0])
    for contribution, weight in zip(contributions[1:], weights[1:], strict=True):
        total = total.add_(contribution, alpha=float(weight))
    return total.div_(float(sum(weights)))


def pull(values: Tensor, sent: Tensor, heard: Mapping[int, Tensor], weights: Mapping[int, float]) -> None:
    """values <- values + sum_j w_j (heard_j - sent) in place, all `[n]`: what gossip makes of an exchange.

    `sent` is what the others heard of us, as they decoded it: with equal weights at both ends of a link the sum of both
    `values` stays what it was, even if they have changed since.
    """
    for worker, theirs in heard.items():
        values.add_(theirs - sent, alpha=weights[worker])


def radial_mean(contributions: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    """Return the weighted mean length along the mean direction, of one tensor from each worker, `[n]` float32.

        (sum_i w_i |x_i| / sum_i w_i) phi(sum_i w_i phi(x_i) / sum_i w_i),   phi(x) = x / |x|,   phi(0) = 0

    Unlike the mean's, its length does not shrink where workers disagree; where their directions cancel it is the mean.
    Decoupled DiLoCo (arXiv 2604.21428), as a third-party implementation transcribes it.
    """
    average = weighted_mean(contributions, weights)
    norms = [float(torch.linalg.vector_norm(each)) for each in contributions]
    directions = [each / norm if norm else each for each, norm in zip(contributions, norms, strict=True)]
    direction = weighted_mean(directions, weights)
    length = float(torch.linalg.vector_norm(direction))
    if length < CANCELLED:
        return average
    radius = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / sum(weights)
    return direction.mul_(radius / length)


class Merge(Part):
    """Makes one vector of what the workers of a round contributed."""

    robust: ClassVar[bool] = True
    """Trusts nobody's arithmetic and nobody's weight: every member hears everybody and merges by itself."""
    whole: ClassVar[bool] = False
    """Judges whole updates, so a model must not be merged in pieces."""
    centered: ClassVar[bool] = False
    """Starts from what it merged in the round before."""

    def check(self, workers: int) -> None:
        """Raise `ConfigError` if so many workers are too few for it."""

    @abstractmethod
    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        """Return a new `[n]` vector from one `[n]` float32 vector a worker, in ascending order of workers.

        `center` `[n]` is what the last round came to, zeros at first; None unless the class is `centered`.
        """


class Mean(Merge):
    """The mean, weighted if the contributions bring weights. One liar moves it as far as it likes."""

    name = "mean"
    robust = False

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        return mean(contributions)


MERGES: dict[str, type[Merge]] = {Mean.name: Mean}
MergeField = Annotated[Merge, BeforeValidator(lambda value: part_named(value, MERGES, Merge, "merge"))]


class Outer(Part):
    """An outer optimiser: one step on the anchor from a mean outer gradient (anchor minus parameters)."""

    lr: float = Field(gt=0)
    """Outer learning rate (eta)."""

    def fit(self, sizes: Sequence[int]) -> Outer:
        """Return the optimiser for vectors that are tensors of so many elements each, one after the other."""
        return self

    def delayed(self, staleness: float) -> Outer:
        """Return the optimiser for an outer gradient that is so many updates old, as the server has measured it."""
        return self

    @abstractmethod
    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        """Change `anchor` and `momentum` in place; `gradient` is left alone. All `[n]` float32."""

    def stretched(self, ratio: float) -> Outer:
        """Return the optimiser for rounds `ratio` times as long: mu' = mu^ratio, eta' = eta (1 - mu') / (1 - mu).

        It remembers as many local steps, and a constant outer gradient moves it as far a round in the end. Raises
        `ConfigError` for an optimiser without a field `momentum`.
        """
        momentum = getattr(self, "momentum", None)
        if not isinstance(momentum, float):
            raise ConfigError(
                f"rule.outer: '{self.spelling()}' has no momentum that could follow the length of a phase; "
                "choose 'nesterov' or 'sgd'"
            )
        kept = momentum**ratio
        return self.model_copy(update={"momentum": kept, "lr": self.lr * (1 - kept) / (1 - momentum)})


class OuterSGD(Outer):
    """Heavy ball: b <- mu b + g; anchor <- anchor - eta b. With momentum 0 and lr 1 the anchor becomes the mean."""

    name = "sgd"
    lr: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """mu."""

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        if self.momentum == 0:
            anchor.sub_(gradient, alpha=self.lr)
            return
        momentum.mul_(self.momentum).add_(gradient)
        anchor.sub_(momentum, alpha=self.lr)


class Nesterov(Outer):
    """b <- mu b + g; anchor <- anchor - eta (g + mu b), as torch's SGD(nesterov=True).

    Defaults from DiLoCo, arXiv 2311.08105, table 5. A constant g moves the anchor by eta (1 + mu) g at first and by
    eta g / (1 - mu) in the end.
    """

    name = "nesterov"
    lr: float = Field(default=0.7, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """mu."""

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        momentum.mul_(self.momentum).add_(gradient)
        anchor.sub_(gradient, alpha=self.lr).sub_(momentum, alpha=self.lr * self.momentum)


OUTERS: dict[str, type[Outer]] = {outer.name: outer for outer in (OuterSGD, Nesterov)}
OuterField = Annotated[Outer, BeforeValidator(lambda value: part_named(value, OUTERS, Outer, "outer optimiser"))]


def consensus_momentum(
    slow: Tensor,
    velocity: Tensor,
    mean_fast: Tensor,
    mean_slow: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
) -> None:
    """NoLoCo's outer step in place: velocity <- alpha velocity + beta mean(fast - slow) - gamma (slow - mean(slow)).

    Then slow <- slow + velocity. `mean_fast` and `mean_slow` are the group's means of the fast weights (theta) and of
    the slow ones (phi), all `[n]`. With gamma = beta the slow mean cancels, so `mean_slow` may then be `slow` itself.
    arXiv 2506.10911, equations 2 and 3, with the sign of beta as in the appendix and the code (the body prints minus).
    """
    velocity.mul_(alpha).add_(mean_fast - mean_slow, alpha=beta)
    if mean_slow is not slow:
        velocity.sub_(slow - mean_slow, alpha=gamma)
    slow.add_(velocity)
