"""DiLoCo (arXiv 2311.08105) with unequal and with dropped workers: weights, denominators, reference points."""

from __future__ import annotations

import asyncio

import pytest
import torch
from cluster import all_equal, cluster, crash, outcomes, quadratic, rounds
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols import DiLoCo, Nesterov, OuterSGD, SyncRule
from decentral.protocols.collectives import AllReduce
from decentral.protocols.robust import Median
from decentral.protocols.schedule import Schedule
from decentral.sim.simulate import simulate


class Uneven(Schedule):
    """Worker i trains i + 1 steps, then 4 - i, and so on: all come to the same number of rounds."""

    def steps(self, peer: Peer) -> int:
        return 4 - peer.id if peer.step % 5 else peer.id + 1


@pytest.mark.parametrize("all_reduce", ["butterfly", "gather"])
@pytest.mark.parametrize("weighted", [True, False])
def test_weights_are_the_samples_since_the_last_round(weighted: bool, all_reduce: AllReduce) -> None:
    rule = DiLoCo(period=Uneven(), outer=OuterSGD(), weighted=weighted, all_reduce=all_reduce)
    run = cluster(rule, 4, 5, batch_size=3)
    outcome = simulate(run)
    task = quadratic(run)
    x = torch.full((16,), task.start)
    for steps in ([1, 2, 3, 4], [4, 3, 2, 1]):
        ends = torch.stack([task.after_sgd(worker, 0.1, steps[worker], x0=x) for worker in range(4)])
        weights = torch.tensor([float(count) for count in steps]) if weighted else torch.ones(4)
        x = (weights[:, None] * ends).sum(dim=0) / weights.sum()
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0], x, atol=1e-6)


def test_equal_weights_are_no_weights() -> None:
    weighted, plain = (simulate(cluster(DiLoCo(period=4, weighted=each), 3, 16)) for each in (True, False))
    assert torch.equal(weighted.params[0], plain.params[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"all_reduce": "ring"}, "all_reduce 'ring' lets all workers count alike"),
        ({"all_reduce": "gather", "merge": Median()}, "merge 'median' lets all workers count alike"),
    ],
)
def test_weights_nobody_would_heed_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiLoCo.model_validate({"weighted": True, **fields}).check(4)


class Silent(DiLoCo):
    """Worker 0 comes to its rounds long after the others have given them up; `until_step` is when it stops to."""

    until_step: int = 1_000_000

    async def agreed_mean(self, peer: Peer, values: Tensor, weight: int = 1) -> Tensor | None:
        if peer.id == 0 and peer.step <= self.until_step:
            await asyncio.sleep(1.2)
        return await super().agreed_mean(peer, values, weight)


def dropped(rule: SyncRule, steps: int, patience_s: float) -> Run:
    return cluster(rule, 3, steps, patience_s=patience_s)


def test_if_every_round_is_dropped_workers_are_independent_and_nothing_decays() -> None:
    run = dropped(Silent(period=5), 20, patience_s=0.1)  # nobody waits for more than ten times as long
    outcome = simulate(run)
    assert {kind for said in outcomes(outcome) for kind, _ in said} == {"skipped"}
    task = quadratic(run)
    for worker in range(3):
        assert torch.allclose(outcome.params[worker], task.after_sgd(worker, 0.1, 20), atol=1e-6)
        assert torch.equal(outcome.slots[worker]["anchor"], torch.full((16,), task.start))
        assert torch.equal(outcome.slots[worker]["momentum"], torch.zeros(16))


def test_after_dropped_rounds_the_delta_spans_all_phases_from_the_last_anchor() -> None:
    """Round 1 is dropped: the second is one Nesterov step on the mean of 10 steps from the start."""
    run = dropped(Silent(period=5, until_step=5), 10, patience_s=1.0)
    outcome = simulate(run)
    assert [next(iter(said))[0] for said in outcomes(outcome)] == ["skipped", "committed"]
    task = quadratic(run)
    start = torch.full((16,), task.start)
    delta = start - torch.stack([task.after_sgd(worker, 0.1, 10) for worker in range(3)]).mean(dim=0)
    assert torch.allclose(outcome.params[0], start - 0.7 * 1.9 * delta, atol=1e-5)


def test_after_a_death_the_mean_is_over_those_who_are_left() -> None:
    """Worker 3 dies in the second phase, at step 7."""
    run = cluster(
        DiLoCo(period=5, outer=Nesterov(lr=0.5, momentum=0.5)), 4, 15, events=[crash(0.42, 3)], detection_s=0.1
    )
    outcome = simulate(run)
    said = [next(iter(of_round)) for of_round in outcomes(outcome)]
    assert [members for _, members in said] == [(0, 1, 2, 3), (0, 1, 2), (0, 1, 2)]
    task = quadratic(run)
    anchor, momentum = torch.full((16,), task.start), torch.zeros(16)
    for _, members in said:
        ends = [task.after_sgd(worker, 0.1, 5, x0=anchor) for worker in members]
        delta = anchor - torch.stack(ends).mean(dim=0)
        momentum = 0.5 * momentum + delta
        anchor = anchor - 0.5 * (delta + 0.5 * momentum)
    assert torch.allclose(outcome.params[0], anchor, atol=2e-6)
    assert len(rounds(outcome)) == 3
