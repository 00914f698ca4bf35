"""AD-PSGD (arXiv 1710.06952): pairs average at any time; the mean is kept and a slow worker holds nobody up."""

from __future__ import annotations

import pytest
import torch
from cluster import STILL, apart, cluster, crash, quadratic, replicas, spread, start_of
from torch import Tensor

from decentral.journal import Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import ADPSGD, Codec, Float32, Int8
from decentral.protocols.codecs import SignMagnitude
from decentral.sim.simulate import simulate


def averages(outcome: Outcome) -> list[tuple[float, tuple[int, ...]]]:
    """Return when an active worker's exchange ended, and between whom, in order of time."""
    found = [record for record in outcome.records if isinstance(record, Synced) and record.outcome == "committed"]
    return sorted((r.time_s, r.members) for r in found if r.channel == f"pair {r.worker}")


def start(workers: int) -> Tensor:
    return torch.stack([start_of(worker, 16) for worker in range(workers)])


@pytest.mark.parametrize("codec", [Float32(), Int8(), SignMagnitude()])
def test_the_mean_is_kept_and_replicas_come_together(codec: Codec) -> None:
    options = {"jitter": 0.5, "speeds": [1, 0.9, 0.3, 0.7, 0.8]}
    outcome = simulate(cluster(apart(ADPSGD(codec=codec)), steps=25, task=STILL, **options))
    assert torch.allclose(replicas(outcome).mean(dim=0), start(5).mean(dim=0), atol=1e-5)
    assert spread(replicas(outcome)) < 0.1 * spread(start(5))


def test_pairs_are_of_one_active_and_one_passive_worker_in_equal_shares() -> None:
    pairs = [members for _, members in averages(simulate(cluster(ADPSGD(), 6, 100, task=STILL)))]
    assert all({worker % 2 for worker in pair} == {0, 1} for pair in pairs)
    assert len(pairs) == 3 * 100
    counts = [pairs.count(pair) for pair in sorted(set(pairs))]
    assert len(counts) == 9
    assert sum((count - 300 / 9) ** 2 / (300 / 9) for count in counts) < 26.1  # chi-square, 8 degrees, 99.9 %


def test_it_equals_averages_and_drifts_in_their_order() -> None:
    """Two workers: the drift of a phase during which an average happened is added to what the average made."""
    run = cluster(apart(ADPSGD(period=4)), 2, 20, speeds=[1.0, 0.45], latency_s=0.001)
    outcome = simulate(run)
    task = quadratic(run)
    shrink = (1 - 0.1 * task.curvatures().double()) ** 4
    model = start(2).double()
    # (time, kind, worker): a phase reads the model at its beginning and adds its drift at its end.
    read: dict[int, Tensor] = {0: model[0].clone(), 1: model[1].clone()}
    events = [(r.time_s, r.worker) for r in outcome.records if isinstance(r, Trained)]
    pairs = [(time, -1) for time, _ in averages(outcome)]
    for _, worker in sorted(events + pairs):
        if worker >= 0:
            model[worker] += (shrink - 1) * (read[worker] - task.centre(worker).double())
            if worker == 1:
                read[1] = model[1].clone()
        else:
            model[:] = model.mean(dim=0)
            read[0] = model[0].clone()
    assert len(pairs) == 5
    assert torch.allclose(replicas(outcome).double(), model, rtol=0, atol=5e-6)


def test_nobody_waits_for_a_slow_worker() -> None:
    """The active workers' time is their own steps and two latencies an exchange, however slow the passive one is."""
    outcome = simulate(cluster(ADPSGD(), steps=40, speeds=[1, 0.05, 1], latency_s=0.001))
    ends = {record.worker: record.time_s for record in outcome.left()}
    assert ends[0] < 40 * 0.05 + 40 * 0.01
    assert ends[1] == pytest.approx(40 * 0.05 / 0.05, rel=0.01)
    outcome = simulate(cluster(ADPSGD(), steps=40, speeds=[0.2, 1], latency_s=0.001))
    assert len(averages(outcome)) == 40  # who is done goes on answering


def test_a_death_ends_in_a_stated_outcome_and_the_others_go_on() -> None:
    for dead in (1, 2):
        run = cluster(ADPSGD(), 6, 60, events=[crash(0.97, dead)], detection_s=0.2)
        outcome = simulate(run)
        assert sorted(outcome.params) == [worker for worker in range(6) if worker != dead]
        skipped = [r for r in outcome.records if isinstance(r, Synced) and r.outcome == "skipped"]
        assert all(dead in record.members or record.time_s > 2.5 for record in skipped)
        assert outcome.seconds < 30


def test_without_anybody_passive_left_an_active_worker_trains_alone() -> None:
    run = cluster(ADPSGD(), 2, 30, events=[crash(0.001, 1)], detection_s=0.0)
    assert torch.allclose(simulate(run).params[0], quadratic(run).after_sgd(0, 0.1, 30), atol=1e-6)
