"""SPARTA with LOSCAR-SGD's overlap: the equations on plain tensors, the masks, and what it reduces to."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from cluster import NET, STILL, all_equal, apart, cluster, crash, drive, quadratic, replicas, rounds, short, start_of
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Left, Synced
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import SPARTA, BFloat16, Int8, LocalSGD
from decentral.protocols.codecs import E3M0, TopK
from decentral.protocols.robust import CenteredClipping
from decentral.protocols.sparta import shared_mask
from decentral.sim.simulate import simulate

BIG = {"name": "quadratic", "dimension": 6000}


def masks_of(run: Run, rate: float, overlap: int, size: int) -> list[Tensor]:
    """Return the masks of the run's rounds, in order."""

    async def script(peer: Peer) -> list[Tensor]:
        lanes = overlap + 1
        drawn = [
            shared_mask(peer, f"sparta mask {count % lanes}", count // lanes + 1, rate) for count in range(run.steps)
        ]
        return [mask for mask in drawn if isinstance(mask, Tensor)]

    first, second = drive(script, 2, task={"name": "quadratic", "dimension": size}).values()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    return first


@pytest.mark.parametrize(("rate", "overlap"), [(0.1, 0), (0.3, 0), (0.2, 1), (0.2, 4), (0.01, 30)])
def test_sparta_equals_the_reference(rate: float, overlap: int) -> None:
    """x+ = mean y + (z - y) on the mask, in float64; y as if it had been sent after the means that came before."""
    run = cluster(SPARTA(rate=rate, overlap=overlap), 3, 20, task={"name": "quadratic", "dimension": 40})
    outcome = simulate(run)
    task = quadratic(run)
    curvature = task.curvatures().double()
    centres = torch.stack([task.centre(worker) for worker in range(3)]).double()
    theta = torch.full_like(centres, task.start)
    flights: deque[tuple[Tensor, Tensor]] = deque()

    def land() -> None:
        mask, sent = flights.popleft()
        pull = torch.zeros_like(theta)
        pull[:, mask] = sent.mean(dim=0) - sent
        theta.add_(pull)
        for later, sent_later in flights:
            sent_later.add_(pull[:, later])

    for mask in masks_of(run, rate, overlap, 40):
        theta = theta - 0.1 * curvature * (theta - centres)
        flights.append((mask, theta[:, mask].clone()))
        if len(flights) > overlap:
            land()
    while flights:
        land()
    assert torch.allclose(replicas(outcome).double(), theta, rtol=0, atol=2e-6)


@pytest.mark.parametrize("codec", [BFloat16(), Int8(), E3M0()], ids=short)
def test_every_parameter_at_once_makes_replicas_equal(codec: BFloat16 | Int8 | E3M0) -> None:
    assert all_equal(simulate(cluster(SPARTA(rate=1.0, codec=codec), 3, 10, task=NET)))


def test_every_parameter_at_once_is_local_sgd() -> None:
    sparta, local = (
        simulate(cluster(rule, 3, 12, task=NET)) for rule in (SPARTA(rate=1.0, period=3), LocalSGD(period=3))
    )
    assert torch.allclose(replicas(sparta), replicas(local), atol=1e-6)


@pytest.mark.parametrize(("size", "rate"), [(1000, 0.01), (1003, 0.13), (40, 0.99), (7, 0.001), (5, 1.0)])
def test_masks_have_distinct_indices_in_order(size: int, rate: float) -> None:
    for mask in masks_of(cluster(SPARTA(), 2, 8), rate, 0, size):
        assert len(mask) == max(1, round(rate * size))
        assert bool((mask.diff() > 0).all())
        assert mask[0] >= 0
        assert mask[-1] < size


def test_coverage_after_n_rounds() -> None:
    """1 - (1 - p)^n; each of 2,000 coordinates is a sample, negatively correlated: a binomial's error is a bound."""
    seen = torch.zeros(2000, dtype=torch.bool)
    for mask in masks_of(cluster(SPARTA(), 2, 60), 0.02, 0, 2000):
        seen[mask] = True
    expected = 1 - 0.98**60
    assert abs(seen.double().mean().item() - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


@pytest.mark.parametrize("overlap", [0, 3])
def test_without_gradients_the_mean_is_kept_and_the_spread_falls(overlap: int) -> None:
    rows = replicas(simulate(cluster(apart(SPARTA(rate=0.25, overlap=overlap)), 4, 12, task=STILL)))
    starts = torch.stack([start_of(worker, 16) for worker in range(4)])
    assert torch.allclose(rows.mean(dim=0), starts.mean(dim=0), atol=1e-5)
    assert rows.var(dim=0).sum() < 0.3 * starts.var(dim=0).sum()


def test_overlap_hides_the_transfer_and_bytes_are_the_share() -> None:
    options = {"latency_s": 0.2}
    seconds = {
        overlap: simulate(cluster(SPARTA(rate=0.01, overlap=overlap), 2, 30, task=BIG, **options)).seconds  # type: ignore[arg-type]
        for overlap in (0, 20)
    }
    assert seconds[0] > 30 * 0.8
    assert seconds[20] < 30 * 0.05 + 0.9
    sent = simulate(cluster(SPARTA(rate=0.1), 2, 10, task=BIG)).left()[0].sent_bytes
    assert sent == pytest.approx(10 * 600 * 4, rel=0.05)


def test_survivors_go_on_and_every_round_has_one_outcome() -> None:
    run = cluster(SPARTA(rate=0.2, overlap=2), 4, 30, events=[crash(0.5, 3)], detection_s=0.1)
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1, 2]
    for lane in range(3):
        for records in rounds(outcome, f"mask {lane}").values():
            assert len({(record.outcome, record.members) for record in records}) == 1
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize(
    ("rule", "workers", "message"),
    [
        (SPARTA(), 1, "needs at least 2 workers"),
        (SPARTA(codec=TopK(), all_reduce="gather"), 3, "sends parameters"),
        (SPARTA(merge=CenteredClipping(), all_reduce="gather"), 3, "starts from the last round's merge"),
    ],
)
def test_what_cannot_work_is_refused(rule: SPARTA, workers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule.check(workers)


def test_timing_only_tells_the_same_story() -> None:
    run = cluster(SPARTA(rate=0.1, overlap=2), 3, 12, task=BIG)

    def story(outcome: Outcome) -> list[object]:
        return [(r.time_s, r.worker, r.sent_bytes) for r in outcome.records if isinstance(r, (Synced, Left))]

    assert story(simulate(run, timing_only=True)) == story(simulate(run))
