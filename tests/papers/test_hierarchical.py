"""Hierarchical DiLoCo against a reference on plain tensors, against DiLoCo, and what travels between regions."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, outcomes, replicas, rounds
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.protocols import DiLoCo, HierarchicalDiLoCo, Nesterov, OuterSGD
from decentral.sim.simulate import simulate


def reference(run: Run, period: int, rounds_of_region: int, regions: list[list[int]]) -> Tensor:
    """Heavy ball 0.8 / 0.3 inside a region, Nesterov 0.7 / 0.9 over all, on plain tensors."""
    plain = Plain(run)
    anchor = plain.start()
    b = torch.zeros_like(anchor)
    own = [(anchor, torch.zeros_like(anchor)) for _ in regions]
    for number, first in enumerate(range(0, run.steps, period), 1):
        last = min(first + period, run.steps)
        for index, workers in enumerate(regions):
            start, velocity = own[index]
            ends = [plain.sgd(worker, range(first, last), start, run.inner.lr) for worker in workers]
            velocity = 0.3 * velocity + start - torch.stack(ends).mean(dim=0)
            own[index] = (start - 0.8 * velocity, velocity)
        if number % rounds_of_region == 0 or last == run.steps:
            workers_of_all = sum(len(workers) for workers in regions)
            delta = sum(len(workers) * (anchor - own[index][0]) for index, workers in enumerate(regions))
            b = 0.9 * b + delta / workers_of_all
            anchor = anchor - 0.7 * (delta / workers_of_all + 0.9 * b)
            own = [(anchor, velocity) for _, velocity in own]
    return anchor


def test_it_equals_the_reference() -> None:
    rule = HierarchicalDiLoCo(period=3, rounds=2, regions=(2, 1), region_outer=OuterSGD(lr=0.8, momentum=0.3))
    run = cluster(rule, 3, 22, task=NOISY, batch_size=2)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert close(outcome.params[0], reference(run, 3, 2, [[0, 1], [2]]))


def test_one_region_is_diloco() -> None:
    """Its outer optimiser is the region's; over all there is nothing left to do."""
    rule = HierarchicalDiLoCo(period=4, rounds=2, regions=(3,), region_outer=Nesterov(), outer=OuterSGD())
    one = simulate(cluster(rule, 3, 14, task=NET))
    assert torch.allclose(replicas(one), replicas(simulate(cluster(DiLoCo(period=4), 3, 14, task=NET))), atol=1e-6)


@pytest.mark.parametrize("regions", [(1, 1, 1), (3,)])
def test_a_worker_a_region_or_a_round_of_all_each_time_is_diloco_with_that_period(regions: tuple[int, ...]) -> None:
    rule = HierarchicalDiLoCo(period=2, rounds=2 if len(regions) == 3 else 1, regions=regions)
    period = 4 if len(regions) == 3 else 2
    levels = simulate(cluster(rule, 3, 14, task=NET))
    diloco = simulate(cluster(DiLoCo(period=period), 3, 14, task=NET))
    assert torch.allclose(replicas(levels), replicas(diloco), atol=1e-6)


def test_regions_are_halves_unless_told_and_talk_among_themselves() -> None:
    outcome = simulate(cluster(HierarchicalDiLoCo(period=2, rounds=3), 5, 12))
    inside = rounds(outcome, "region")
    assert len(inside) == 6
    assert {record.members for records in inside.values() for record in records} == {(0, 1, 2), (3, 4)}
    assert outcomes(outcome) == [{("committed", (0, 1, 2, 3, 4))}] * 2


def test_traffic_is_that_of_both_levels() -> None:
    task = {"name": "quadratic", "dimension": 40_000, "curvature": (1.0, 1.0)}
    rule = HierarchicalDiLoCo(period=1, rounds=4, regions=(3, 1))
    sent = [left.sent_bytes / 160_000 for left in simulate(cluster(rule, 4, 8, task=task), timing_only=True).left()]
    of_all, of_three = 2 * 2 * 3 / 4, 8 * 2 * 2 / 3  # two butterflies of four, eight of three
    assert sent == pytest.approx([of_three + of_all] * 3 + [of_all], rel=0.01)


def test_survivors_of_a_death_end_equal() -> None:
    outcome = simulate(cluster(HierarchicalDiLoCo(period=2, rounds=2), 4, 12, events=[crash(0.32, 1)], patience_s=5.0))
    assert sorted(outcome.params) == [0, 2, 3]
    assert all_equal(outcome)
    assert outcomes(outcome)[-1] == {("committed", (0, 2, 3))}


@pytest.mark.parametrize("at_s", [0.12, 0.22, 0.26, 0.31, 0.4])
def test_after_a_death_a_region_holds_the_same_bits_and_the_others_do_not_notice(at_s: float) -> None:
    """Whenever worker 1 dies: the region's next rounds are its survivors', momentum and all, and none is skipped."""
    task = {"name": "quadratic", "dimension": 4000}  # a region's round takes 0.1 s
    rule = HierarchicalDiLoCo(period=2, rounds=99, regions=(3, 2), region_outer=OuterSGD(lr=0.8, momentum=0.5))
    links = {"up_bps": 2e6, "down_bps": 2e6, "latency_s": 0.001, "detection_s": 0.1}
    outcome = simulate(cluster(rule, 5, 8, task=task, events=[crash(at_s, 1)], patience_s=5.0, **links))  # type: ignore[arg-type]
    inside = rounds(outcome, "region").values()
    said = [{(record.outcome, record.members) for record in records if record.worker in (0, 2)} for records in inside]
    assert all(len(of_round) == 1 for of_round in said)
    assert {kind for of_round in said for kind, _ in of_round} == {"committed", "degraded"}
    assert said[-1] == {("committed", (0, 2))}
    others = {(record.outcome, record.members) for records in inside for record in records if record.worker in (3, 4)}
    assert others == {("committed", (3, 4))}
    for name in ("region.anchor", "region.momentum"):
        assert torch.equal(outcome.slots[0][name], outcome.slots[2][name])
    assert not torch.equal(outcome.slots[0]["region.momentum"], outcome.slots[3]["region.momentum"])
    assert all_equal(outcome)


@pytest.mark.parametrize("regions", [(2, 1), (4, 1)])
def test_regions_that_do_not_have_all_workers_are_refused(regions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"are {sum(regions)} workers, the fleet has 4"):
        cluster(HierarchicalDiLoCo(regions=regions), 4).check()
