"""Merges that stand liars, against definitions written out by hand, brute force, and the bounds their papers prove."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cluster import all_equal, cluster, outcomes, short
from pydantic import ValidationError
from torch import Tensor

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols import DiLoCo, OuterSGD
from decentral.protocols.merge import MERGES, Mean, Merge
from decentral.protocols.robust import (
    SLICE,
    CenteredClipping,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    TrimmedMean,
)
from decentral.sim.simulate import simulate

ROBUST = [
    Median(),
    TrimmedMean(),
    Krum(),
    MultiKrum(),
    GeometricMedian(),
    CenteredClipping(),
    NearestNeighborMixing(),
]
EVERY = pytest.mark.parametrize("merge", ROBUST, ids=short)


def normals(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def merged(merge: Merge, contributions: Tensor | Sequence[Tensor], center: Tensor | None = None) -> Tensor:
    """Merge as a round does: the center is zeros at first, and only for a merge that remembers one."""
    rows = list(contributions)
    if merge.centered and center is None:
        center = torch.zeros_like(rows[0])
    return merge.merge(rows, center)


# -- definitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_median_is_numpys(count: int) -> None:
    contributions = normals(count, SLICE + 37)
    expected = torch.from_numpy(np.median(contributions.numpy(), axis=0))
    assert torch.allclose(merged(Median(), contributions), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "liars"), [(1, 0), (5, 0), (3, 1), (6, 1), (9, 4), (10, 3)])
def test_trimmed_mean_sorts_and_leaves_out_the_ends(count: int, liars: int) -> None:
    contributions = normals(count, SLICE + 37)
    expected = contributions.sort(dim=0).values[liars : count - liars].mean(dim=0)
    assert torch.allclose(merged(TrimmedMean(liars=liars), contributions), expected, rtol=0, atol=1e-6)


SEVEN = torch.tensor([[1, 1], [7, 8], [6, 7], [7, 0], [4, 0], [0, 4], [5, 8]], dtype=torch.float32)
"""Two liars: squared distances and n - f - 2 neighbours give 57, 70, 49, 96, 51, 83, 47. Plain distances, or one
neighbour more, would choose row 2, and distances to the fourth power row 4."""


def krum_scores(contributions: Tensor, liars: int) -> Tensor:
    """Return the scores by brute force, [n] float64."""
    rows = contributions.double()
    squared = (rows[:, None] - rows[None]).square().sum(dim=-1)
    count = len(rows)
    return torch.stack(
        [
            torch.cat([squared[row, :row], squared[row, row + 1 :]]).sort().values[: count - liars - 2].sum()
            for row in range(count)
        ]
    )


def test_krum_by_hand() -> None:
    assert krum_scores(SEVEN, 2).tolist() == [57, 70, 49, 96, 51, 83, 47]
    assert torch.equal(merged(Krum(liars=2), SEVEN), SEVEN[6])


def test_multi_krum_is_the_mean_of_the_best_by_hand() -> None:
    assert torch.allclose(merged(MultiKrum(liars=2), SEVEN), SEVEN[[2, 4, 6]].mean(dim=0))
    assert torch.allclose(merged(MultiKrum(liars=2, best=4), SEVEN), SEVEN[[0, 2, 4, 6]].mean(dim=0))
    assert torch.equal(merged(MultiKrum(liars=2, best=1), SEVEN), merged(Krum(liars=2), SEVEN))


@pytest.mark.parametrize(("count", "liars"), [(3, 0), (5, 1), (8, 2), (13, 5)])
def test_krum_chooses_the_best_score(count: int, liars: int) -> None:
    for seed in range(20):
        contributions = normals(count, 12, seed)
        best_first = krum_scores(contributions, liars).argsort()
        assert torch.equal(merged(Krum(liars=liars), contributions), contributions[best_first[0]])
        chosen = contributions[best_first[: count - liars - 2]].mean(dim=0)
        assert torch.allclose(merged(MultiKrum(liars=liars), contributions), chosen, atol=1e-6)


def test_a_tie_goes_to_the_lower_worker() -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert torch.equal(merged(Krum(liars=0), corners), corners[0])
    assert torch.equal(merged(Krum(liars=0), corners.flip(0)), corners[3])


def weiszfeld(contributions: Tensor) -> Tensor:
    """Return the geometric median, [n] float64, by 3,000 plain steps on the vectors themselves."""
    rows = contributions.double()
    z = rows.median(dim=0).values
    for _ in range(3_000):
        nearness = 1 / (z - rows).norm(dim=1).clamp_min(1e-12)
        z = (nearness[:, None] * rows).sum(dim=0) / nearness.sum()
    return z


@pytest.mark.parametrize("lie", [1.0, 10.0, 1e5])
@pytest.mark.parametrize(("count", "liars", "size"), [(3, 1, 5), (5, 2, 10), (9, 4, 10)])
def test_geometric_median_is_where_weiszfeld_ends(count: int, liars: int, size: int, lie: float) -> None:
    contributions = normals(count, size, seed=1)
    contributions[:liars] *= lie
    assert torch.allclose(merged(GeometricMedian(), contributions).double(), weiszfeld(contributions), atol=1e-5)


def test_geometric_median_of_a_triangle_sees_its_sides_under_120_degrees() -> None:
    """Fermat's point: the unit vectors to the corners sum to zero."""
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]])
    away = corners - merged(GeometricMedian(), corners)
    assert torch.allclose((away / away.norm(dim=1, keepdim=True)).sum(dim=0), torch.zeros(2), atol=1e-5)


def test_geometric_median_stays_with_a_majority_at_one_point() -> None:
    contributions = torch.cat([torch.ones(3, 8), normals(2, 8)])
    assert torch.allclose(merged(GeometricMedian(), contributions), torch.ones(8), atol=1e-4)


def clipped_steps(contributions: Tensor, center: Tensor, loops: int, tau: float | None) -> Tensor:
    """Return centered clipping on the vectors themselves, in float64."""
    rows, v = contributions.double(), center.double()
    for _ in range(loops):
        pulls = rows - v
        norms = pulls.norm(dim=1, keepdim=True)
        longest = norms.flatten().sort().values[len(rows) // 2] if tau is None else tau
        v = v + (pulls * (longest / norms).clamp_max(1)).mean(dim=0)
    return v


@pytest.mark.parametrize("tau", [None, 0.5, 2.0])
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_centered_clipping_step_by_step(count: int, loops: int, tau: float | None) -> None:
    contributions, center = normals(count, 12), normals(1, 12, seed=5)[0]
    expected = clipped_steps(contributions, center, loops, tau)
    merge = CenteredClipping(tau=tau, loops=loops)
    assert torch.allclose(merged(merge, contributions, center).double(), expected, atol=1e-6)


@pytest.mark.parametrize("lie", [10.0, 1e5, 1e15])
def test_liars_move_the_clipped_center_by_their_share_of_tau(lie: float) -> None:
    """Honest workers who are where the center is hold it there: all that moves it is f tau / n."""
    center = normals(1, 50)[0]
    contributions = center.repeat(10, 1)
    contributions[3:5] += lie
    shift = merged(CenteredClipping(tau=1.0, loops=1), contributions, center) - center
    assert shift.norm().item() == pytest.approx(2 * 1.0 / 10, rel=1e-3)


def test_clipping_nothing_is_the_mean_wherever_the_center_was() -> None:
    contributions, center = normals(6, 30), normals(1, 30, seed=9)[0]
    for tau in (1e6, float("inf")):
        result = merged(CenteredClipping(tau=tau), contributions, center)
        assert torch.allclose(result, contributions.mean(dim=0), atol=1e-6)


def test_the_automatic_tau_catches_up_with_updates_far_from_the_last() -> None:
    contributions = 100 + normals(7, 20)
    contributions[0] = -1e4
    expected = contributions[1:].mean(dim=0)
    assert (merged(CenteredClipping(), contributions) - expected).norm() < 2


def test_nearest_neighbor_mixing_by_brute_force() -> None:
    contributions = normals(7, 12, seed=2)
    nearest = torch.cdist(contributions.double(), contributions.double()).argsort(dim=1)[:, :5]
    mixed = torch.stack([contributions[row].mean(dim=0) for row in nearest])
    for then in (Median(), TrimmedMean(liars=2), Krum(liars=2)):
        merge = NearestNeighborMixing(liars=2, then=then)
        assert torch.allclose(merged(merge, contributions), merged(then, mixed), atol=1e-5)


# -- what all promise ------------------------------------------------------------------------------------------------


def shares(liars: int, count: int) -> float:
    return liars / (count - 2 * liars)


def median_kappa(liars: int, count: int) -> float:
    return 4 * (1 + shares(liars, count)) ** 2


KAPPAS: dict[type[Merge], Callable[[int, int], float]] = {
    Median: median_kappa,
    GeometricMedian: median_kappa,
    TrimmedMean: lambda liars, count: 6 * shares(liars, count) * (1 + shares(liars, count)),
    Krum: lambda liars, count: 6 * (1 + shares(liars, count)),
    NearestNeighborMixing: lambda liars, count: 8 * liars / (count - liars) * (median_kappa(liars, count) + 1),
}
"""What is proved, in the table of Allouah et al., arXiv 2302.01772."""


def lies(honest: Tensor, liars: int, generator: torch.Generator) -> list[Tensor]:
    """Return attacks of growing size on honest rows, each [liars, size]: apart, together, close by, and reversed."""
    mean, (_, size) = honest.mean(dim=0), honest.shape
    direction = torch.randn(size, generator=generator)
    found = [(mean - 1.5 * honest.std(dim=0)).repeat(liars, 1), honest[:1].repeat(liars, 1)]
    for scale in (0.1, 1.0, 3.0, 10.0, 1e3, 1e6):
        found += [
            mean + scale * torch.randn(liars, size, generator=generator),
            (mean + scale * direction).repeat(liars, 1),
            (-scale * mean).repeat(liars, 1),
        ]
    return found


def observed_kappa(merge: Merge, count: int, liars: int) -> float:
    """Return the largest |merge - honest mean|^2 / (mean |x_i - honest mean|^2) of many attacks."""
    worst, generator = 0.0, torch.Generator().manual_seed(count)
    for far in (0.0, 10.0):
        honest = far + torch.randn(count - liars, 8, generator=generator)
        mean = honest.mean(dim=0)
        variance = (honest - mean).square().sum(dim=1).mean()
        for bad in lies(honest, liars, generator):
            order = torch.randperm(count, generator=generator)
            error = (merged(merge, torch.cat([honest, bad])[order]) - mean).square().sum()
            worst = max(worst, float(error / variance))
    return worst


@pytest.mark.parametrize(("count", "liars"), [(5, 1), (7, 2), (10, 2), (11, 4)])
@pytest.mark.parametrize("cls", KAPPAS, ids=lambda cls: cls.name)
def test_no_attack_does_more_harm_than_is_proved(cls: type[Merge], count: int, liars: int) -> None:
    merge = cls(**({"liars": liars} if "liars" in cls.model_fields else {}))
    assert observed_kappa(merge, count, liars) <= KAPPAS[cls](liars, count)


@pytest.mark.parametrize(("count", "liars"), [(5, 1), (7, 2), (10, 2), (11, 4)])
@pytest.mark.parametrize("merge", [MultiKrum, CenteredClipping], ids=lambda cls: cls.name)
def test_merges_without_a_proved_kappa_stay_within_that_of_krum(merge: type[Merge], count: int, liars: int) -> None:
    made = merge(liars=liars) if merge is MultiKrum else merge()
    assert observed_kappa(made, count, liars) <= KAPPAS[Krum](liars, count)


def test_the_mean_has_no_kappa() -> None:
    assert observed_kappa(Mean(), 10, 2) > 1e9


@EVERY
@pytest.mark.parametrize("lie", [1e30, -1e30])
def test_one_worker_at_1e30_leaves_a_finite_merge_among_the_honest(merge: Merge, lie: float) -> None:
    contributions = normals(6, 40)
    contributions[2] = lie
    result = merged(merge, contributions)
    honest = contributions[[0, 1, 3, 4, 5]]
    assert torch.isfinite(result).all()
    assert (result - honest.mean(dim=0)).norm() <= (honest - honest.mean(dim=0)).norm(dim=1).max()
    assert not merged(Mean(), contributions).abs().max() < 1e20


@EVERY
def test_the_order_of_workers_does_not_matter(merge: Merge) -> None:
    contributions = normals(7, 40)
    result = merged(merge, contributions)
    for seed in range(5):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(merged(merge, contributions[order]), result, atol=1e-5)


@EVERY
def test_a_shift_of_all_shifts_the_merge(merge: Merge) -> None:
    contributions, shift = normals(6, 40), 3 * normals(1, 40, seed=7)[0]
    moved = merged(merge, contributions + shift, center=shift if merge.centered else None)
    assert torch.allclose(moved, merged(merge, contributions) + shift, atol=2e-5)


@EVERY
def test_who_agree_are_believed(merge: Merge) -> None:
    vector = normals(1, 40)[0]
    assert torch.allclose(merged(merge, vector.repeat(6, 1)), vector, rtol=0, atol=1e-5)
    assert torch.equal(merged(merge, torch.zeros(6, 40)), torch.zeros(40))


@EVERY
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_than_were_planned_are_merged_all_the_same(merge: Merge, count: int) -> None:
    """Who sets out with two liars among seven may find four contributions or one."""
    merge = merge.model_copy(update={"liars": 2}) if hasattr(merge, "liars") else merge
    contributions = normals(count, 40)
    result = merged(merge, contributions, center=contributions[0].clone())
    assert (result >= contributions.min(dim=0).values - 1e-6).all()
    assert (result <= contributions.max(dim=0).values + 1e-6).all()
    if count == 1:
        assert torch.equal(result, contributions[0])
    result.add_(1)
    assert torch.equal(contributions, normals(count, 40))


@pytest.mark.parametrize(
    ("cls", "most"),
    [(TrimmedMean, 3), (NearestNeighborMixing, 3), (MultiKrum, 2)],
    ids=lambda value: getattr(value, "name", value),
)
def test_too_few_contributions_admit_fewer_liars(cls: type[Merge], most: int) -> None:
    contributions = normals(7, 40)
    at_most, fewer = (merged(cls(liars=liars), contributions) for liars in (most, most - 1))
    assert torch.equal(merged(cls(liars=9), contributions), at_most)
    assert not torch.equal(at_most, fewer)


@pytest.mark.parametrize("merge", [TrimmedMean(liars=0), NearestNeighborMixing(liars=0)], ids=short)
def test_without_liars_it_is_the_mean(merge: Merge) -> None:
    contributions = normals(6, 40)
    assert torch.allclose(merged(merge, contributions), contributions.mean(dim=0), atol=1e-6)


@EVERY
def test_members_with_other_threads_end_with_the_same_bits(merge: Merge) -> None:
    contributions = normals(7, 3 * SLICE + 5)
    kept = contributions.clone()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(merged(merge, contributions))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(contributions, kept)


def test_updates_longer_than_a_slice_are_judged_whole() -> None:
    """Row 1 is closest to the others in the first slice, and far from them in the last."""
    contributions = normals(5, 2 * SLICE + 10)
    contributions[1, :SLICE] = contributions[:, :SLICE].mean(dim=0)
    contributions[1, SLICE:] += 3
    expected = contributions[krum_scores(contributions, 1).argmin()]
    assert not torch.equal(expected, contributions[1])
    assert torch.equal(merged(Krum(), contributions), expected)


# -- in a round ------------------------------------------------------------------------------------------------------


class Lying(DiLoCo):
    """Of these workers the first contributes its update reversed and ten times as long."""

    async def agreed_mean(self, peer: Peer, values: Tensor, weight: int = 1) -> Tensor | None:
        return await super().agreed_mean(peer, -10 * values if peer.id == 0 else values, weight)


BOWL = {"name": "quadratic", "dimension": 16, "spread": 0.3, "noise": 0.3}


@EVERY
def test_training_goes_on_beside_a_liar(merge: Merge) -> None:
    rule = Lying(period=5, outer=OuterSGD(), all_reduce="gather", merge=merge)
    outcome = simulate(cluster(rule, 6, 60, task=BOWL))
    honest = simulate(cluster(DiLoCo(period=5, outer=OuterSGD()), 6, 60, task=BOWL))
    assert all_equal(outcome)
    assert {said for each in outcomes(outcome) for said, _ in each} == {"committed"}
    assert outcome.after["loss"] < honest.after["loss"] + 0.1 * (honest.before["loss"] - honest.after["loss"])


def test_one_liar_is_enough_to_break_the_mean() -> None:
    outcome = simulate(cluster(Lying(period=5, outer=OuterSGD()), 6, 60, task=BOWL))
    assert outcome.after["loss"] > 100 * outcome.before["loss"]


# -- as parts --------------------------------------------------------------------------------------------------------


@EVERY
def test_a_run_file_names_it(merge: Merge) -> None:
    rule = {"name": "diloco", "all_reduce": "gather", "merge": merge.name}
    run = validated({"rule": rule, "fleet": {"workers": [{"count": 5}]}}, "run")
    assert run.rule.merge == merge  # type: ignore[attr-defined]
    assert Run.model_validate(run.to_table()) == run


@pytest.mark.parametrize(
    ("merge", "least"),
    [
        (Median(), 3),
        (GeometricMedian(), 3),
        (CenteredClipping(), 3),
        (TrimmedMean(liars=2), 5),
        (NearestNeighborMixing(liars=2), 5),
        (Krum(liars=2), 7),
        (MultiKrum(liars=2), 7),
        (NearestNeighborMixing(liars=1, then=Krum(liars=1)), 5),
    ],
    ids=short,
)
def test_too_few_workers_are_refused(merge: Merge, least: int) -> None:
    merge.check(least)
    with pytest.raises(ConfigError, match=f"at least {least} workers"):
        merge.check(least - 1)


def test_a_mean_that_must_hold_a_liar_is_refused() -> None:
    MultiKrum(liars=2, best=5).check(7)
    with pytest.raises(ConfigError, match="choose 5 at most"):
        MultiKrum(liars=2, best=6).check(7)


@pytest.mark.parametrize("then", ["mean", "centered_clipping"])
def test_mixing_needs_a_robust_merge_behind_it(then: str) -> None:
    with pytest.raises(ValidationError, match=f"'{then}' cannot stand behind it"):
        NearestNeighborMixing(then=then)


def test_all_are_known_by_name() -> None:
    assert {merge.name: type(merge) for merge in ROBUST}.items() <= MERGES.items()
