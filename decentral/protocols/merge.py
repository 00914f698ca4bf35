"""How it is merged: what several workers have becomes one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from decentral.naming import Kind

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


def length(values: Tensor) -> float:
    """Return the norm of `values` `[n]` to seven digits: who sums in another order must come to the same replica.

    0 for a phantom.
    """
    if not isinstance(values, Tensor):
        return 0.0
    return float(f"{float(torch.linalg.vector_norm(values, dtype=torch.float64)):.7g}")


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two vectors `[n]`, to seven decimals for the same reason as `length`.

    0 if either has no length, and for phantoms.
    """
    if not isinstance(one, Tensor):
        return 0.0
    one, other = one.double(), other.double()
    scale = float(torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other))
    return round(float(one @ other) / scale, 7) if scale else 0.0


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


class Merge(Kind):
    """Makes one vector of what the workers of a round contributed."""

    called = "merge"
    built_in: ClassVar[dict[str, type[Merge]]] = {}

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


Merge.built_in[Mean.name] = Mean
MERGES = Merge.built_in
