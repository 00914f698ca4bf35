"""Merges that hold although some workers lie: bounded harm from `liars` arbitrary contributions of n.

None of them trusts a weight, so all contributions count alike. What they promise is (f, kappa)-robustness (Allouah et
al., arXiv 2302.01772): for every n - f honest contributions S,

    |merge(x) - mean_S|^2 <= kappa mean_{i in S} |x_i - mean_S|^2

with a kappa that knows nothing of what the others sent (the constants below are from memory of the paper; searches for
counterexamples stay below them). The mean has none. Rules that judge distances know the
contributions by their Gram matrix alone, and answer with one coefficient a worker: whatever they iterate costs n^2, and
the model is read twice. Coefficients are rounded to float32 and scores compared in it, so that members whose processors
sum in another order still end with the same bits.

Should fewer contributions come than the run has workers, a rule stands as many liars as the number that came admits,
and a single one is returned as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from decentral.errors import ConfigError
from decentral.protocols.merge import MERGES, Merge, mean

SLICE = 1 << 16
"""Elements of all contributions looked at together: little memory besides the contributions themselves."""
WEISZFELD_STEPS = 100
"""A fixed number, so that all members do the same; from its start the iteration needs a few dozen."""
SMOOTHING = 1e-6
"""Least distance in Weiszfeld's weights, in median norms; a Gram matrix in float64 resolves 1e-8 of a norm."""
TINY = torch.finfo(torch.float32).tiny


class Median(Merge):
    """The median of each coordinate; of an even number the mean of the two middle ones.

    Yin et al., arXiv 1803.01498. Stands any minority of liars; kappa = 4 (1 + f / (n - 2f))^2.
    """

    name = "median"

    def check(self, workers: int) -> None:
        _require(self, workers, 3, liars=1)

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        return _trimmed(contributions, (len(contributions) - 1) // 2)


class TrimmedMean(Merge):
    """The mean of each coordinate without its f largest and f smallest values.

    Yin et al., arXiv 1803.01498; kappa = 6 f / (n - 2f) (1 + f / (n - 2f)).
    """

    name = "trimmed_mean"
    liars: int = Field(default=1, ge=0)
    """Contributions that may be anything (f); fewer than half."""

    def check(self, workers: int) -> None:
        _require(self, workers, 2 * self.liars + 1, self.liars)

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        return _trimmed(contributions, min(self.liars, (len(contributions) - 1) // 2))


class Krum(Merge):
    """The contribution that lies closest to its n - f - 2 nearest others, by the sum of squared distances.

    Blanchard et al., "Machine learning with adversaries", NeurIPS 2017; kappa = 6 (1 + f / (n - 2f)). A tie goes to the
    lower worker. It is one worker's update: the noise is not averaged away.
    """

    name = "krum"
    whole = True
    liars: int = Field(default=1, ge=0)
    """Contributions that may be anything (f); n must be 2f + 3 at least."""

    def check(self, workers: int) -> None:
        _require(self, workers, 2 * self.liars + 3, self.liars)

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        return contributions[_by_krum(contributions, self._liars(len(contributions)))[0]].clone()

    def _liars(self, count: int) -> int:
        return max(0, min(self.liars, (count - 3) // 2))


class MultiKrum(Krum):
    """The mean of the m contributions with the best scores of Krum; m = n - f - 2 if unset."""

    name = "multi_krum"
    best: PositiveInt | None = None
    """Contributions that are averaged (m); n - f at most."""

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.best is not None and self.best > workers - self.liars:
            raise ConfigError(
                f"rule.merge.best: the best {self.best} of {workers} contributions are sure to hold one of the "
                f"{self.liars} liars'; choose {workers - self.liars} at most"
            )

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        count = len(contributions)
        liars = self._liars(count)
        best = min(self.best, count - liars) if self.best else max(1, count - liars - 2)
        return mean([contributions[worker] for worker in sorted(_by_krum(contributions, liars)[:best])])


class GeometricMedian(Merge):
    """The point with the least sum of distances to all contributions.

        z <- sum_i b_i x_i / sum_i b_i,   b_i = 1 / max(|z - x_i|, nu)

    Pillutla et al., RFA, arXiv 1912.13445: smoothed Weiszfeld, nu = 1e-6 median norms. Stands any minority of liars;
    kappa = 4 (1 + f / (n - 2f))^2. The first b_i are 1 / median_j |x_i - x_j|, which no minority can make large for
    itself: from equal weights a far liar would lose but a factor f / (n - f) of its weight in a step.
    """

    name = "geometric_median"
    whole = True

    def check(self, workers: int) -> None:
        _require(self, workers, 3, liars=1)

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        gram = inner_products(contributions)
        least = SMOOTHING * gram.diagonal().sqrt().median().clamp_min(TINY)
        others = _squared_distances(gram).sqrt().sort(dim=1).values  # the first is the distance to itself, 0
        nearness = others[:, len(contributions) // 2].clamp_min(least).reciprocal()
        for _ in range(WEISZFELD_STEPS):
            weights = nearness / nearness.sum()
            nearness = _distances_to(weights, gram).clamp_min(least).reciprocal()
        return _combined(contributions, nearness / nearness.sum())


class CenteredClipping(Merge):
    """The last round's merge v, moved by the mean of what the contributions differ from it, each clipped to length tau.

        v <- v + mean_i (x_i - v) min(1, tau / |x_i - v|),   several times

    Karimireddy et al., arXiv 2012.10333. In one such step f liars move v by f tau / n at most. Unless `tau` is given it
    is the upper median of the distances |x_i - v|, anew in each step: no minority of liars can make it longer than the
    longest honest one, or shorter than the shortest, and it follows the updates as they shrink.
    """

    name = "centered_clipping"
    centered = True
    tau: PositiveFloat | None = None
    """Longest pull of one contribution, in the norm of an update; the median distance if unset."""
    loops: PositiveInt = 10
    """Steps in a round; they cost next to nothing. One will do where updates hardly change from round to round, but
    with one, v never catches up with updates that turn: liars then keep it where it was."""

    def check(self, workers: int) -> None:
        _require(self, workers, 3, liars=1)

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        assert center is not None
        count = len(contributions)
        if count == 1:
            return contributions[0].clone()
        points = [*contributions, center]
        gram = inner_products(points)
        weights = torch.zeros_like(gram[-1])
        weights[-1] = 1
        for _ in range(self.loops):
            distances = _distances_to(weights, gram)[:count]
            tau = distances.sort().values[count // 2] if self.tau is None else self.tau
            pulls = (tau / distances).nan_to_num(nan=1.0).clamp_max(1) / count
            weights.mul_(1 - pulls.sum())
            weights[:count] += pulls
        return _combined(points, weights)


class NearestNeighborMixing(Merge):
    """Puts for each contribution the mean of the n - f nearest to it, itself among them, and merges these.

    Allouah et al., arXiv 2302.01772: where the merge behind it has kappa, it has 8 f / (n - f) (kappa + 1), which pays
    where honest updates differ because the workers' data do. Holds as many vectors again as there are contributions.
    """

    name = "nearest_neighbor_mixing"
    whole = True
    liars: int = Field(default=1, ge=0)
    """Contributions that may be anything (f); fewer than half."""
    then: Merge = Median()
    """What merges the mixed contributions."""

    @model_validator(mode="after")
    def _robust_behind(self) -> NearestNeighborMixing:
        if self.then.centered or not self.then.robust:
            raise ValueError(
                f"then: '{self.then.spelling()}' cannot stand behind it; choose 'median' or 'trimmed_mean'"
            )
        return self

    def check(self, workers: int) -> None:
        _require(self, workers, 2 * self.liars + 1, self.liars)
        self.then.check(workers)

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        count = len(contributions)
        near = count - min(self.liars, (count - 1) // 2)
        order = _squared_distances(inner_products(contributions)).sqrt().float().sort(dim=1, stable=True).indices
        mixed = [mean([contributions[worker] for worker in sorted(row[:near])]) for row in order.tolist()]
        return self.then.merge(mixed, None)


MERGES.update(
    {
        merge.name: merge
        for merge in (
            Median,
            TrimmedMean,
            Krum,
            MultiKrum,
            GeometricMedian,
            CenteredClipping,
            NearestNeighborMixing,
        )
    }
)


def _require(merge: Merge, workers: int, least: int, liars: int) -> None:
    if workers < least:
        raise ConfigError(
            f"rule.merge: '{merge.spelling()}' needs at least {least} workers against {liars} that lie, "
            f"the fleet has {workers}"
        )


def _slices(contributions: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    for start in range(0, contributions[0].numel(), SLICE):
        part = slice(start, start + SLICE)
        yield part, [contribution[part] for contribution in contributions]


def _trimmed(contributions: Sequence[Tensor], trim: int) -> Tensor:
    """Return the mean of each coordinate without its `trim` smallest and largest values."""
    result = torch.empty_like(contributions[0])
    for part, rows in _slices(contributions):
        result[part] = mean(_in_order(rows)[trim : len(rows) - trim])
    return result


def _in_order(rows: list[Tensor]) -> list[Tensor]:
    """Sort each coordinate by exchanging neighbours, odd and even pairs in turn.

    For the few rows there are it takes a tenth of `torch.sort`'s time, which is made for long ones.
    """
    for turn in range(len(rows)):
        for low in range(turn % 2, len(rows) - 1, 2):
            one, other = rows[low : low + 2]
            rows[low : low + 2] = torch.minimum(one, other), torch.maximum(one, other)
    return rows


def inner_products(contributions: Sequence[Tensor]) -> Tensor:
    """Return all inner products, `[n, n]` float64: the square of 1e30 is beyond float32."""
    count = len(contributions)
    gram = torch.zeros(count, count, dtype=torch.float64, device=contributions[0].device)
    for _, rows in _slices(contributions):
        stacked = torch.stack(rows).double()
        gram += stacked @ stacked.T
    return gram


def _squared_distances(gram: Tensor) -> Tensor:
    """Return |x_i - x_j|^2, `[n, n]` float64, with zeros on the diagonal."""
    norms = gram.diagonal()
    squared: Tensor = norms + norms[:, None] - 2 * gram
    return squared.clamp_min(0)


def _distances_to(weights: Tensor, gram: Tensor) -> Tensor:
    """Return |x_i - z| for z = sum_j w_j x_j, `[n]` float64."""
    reach: Tensor = gram @ weights
    squared: Tensor = gram.diagonal() - 2 * reach + weights @ reach
    return squared.clamp_min(0).sqrt()


def _combined(contributions: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return sum_i w_i x_i, summed in the order given."""
    first, *others = weights.float().tolist()
    total: Tensor = contributions[0] * first
    for contribution, weight in zip(contributions[1:], others, strict=True):
        total.add_(contribution, alpha=weight)
    return total


def _by_krum(contributions: Sequence[Tensor], liars: int) -> list[int]:
    """Return the places of the contributions by their score, the best first and of equals the lower first."""
    nearest = max(0, len(contributions) - liars - 2)
    ordered = _squared_distances(inner_products(contributions)).sort(dim=1).values
    scores = ordered[:, 1 : 1 + nearest].sum(dim=1)  # the first is the distance to itself
    best_first: list[int] = scores.sqrt().float().argsort(stable=True).tolist()
    return best_first
