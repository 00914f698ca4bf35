"""Eager updates (arXiv 2502.12996): the equations on plain tensors, and what they reduce to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, quadratic, replicas, rounds, short
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.inner import SGD, AdamW, Inner
from decentral.journal import Left, Synced
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import DiLoCo, EagerDiLoCo, Int8, Nesterov, OuterSGD
from decentral.protocols.codecs import E3M0
from decentral.protocols.robust import Median
from decentral.sim.simulate import simulate

BIG = {"name": "quadratic", "dimension": 6000}


def reference(run: Run, steps_per_round: int, eta: float, mu: float) -> Tensor:
    """The equations of the paper in float64, with the closing round; all workers' anchors, [workers, P]."""
    task, count = quadratic(run), run.fleet.size
    curvature = task.curvatures().double()
    centres = torch.stack([task.centre(worker).double() for worker in range(count)])
    anchors = torch.full_like(centres, task.start)
    momenta = torch.zeros_like(anchors)
    before = torch.zeros_like(anchors)  # the outer gradients of a phase ago
    for end in range(steps_per_round, run.steps + 1, steps_per_round):
        theta = centres + (1 - run.inner.lr * curvature) ** steps_per_round * (anchors - centres)
        deltas = anchors - theta
        others = before.sum(dim=0) - before
        gradients = (deltas + others) / count
        if end == run.steps:
            gradients = others / count + deltas.mean(dim=0)
        momenta = mu * momenta + gradients
        anchors = anchors - eta * (gradients + mu * momenta)
        before = deltas
    return anchors


@pytest.mark.parametrize(("workers", "steps"), [(2, 4), (3, 12), (4, 28)])
def test_eager_equals_the_reference(workers: int, steps: int) -> None:
    run = cluster(EagerDiLoCo(period=4), workers, steps)
    outcome = simulate(run)
    assert torch.allclose(replicas(outcome).double(), reference(run, 4, eta=0.4, mu=0.9), rtol=0, atol=5e-6)
    assert len(rounds(outcome)) == steps // 4


@pytest.mark.parametrize("inner", [SGD(lr=0.1), AdamW(lr=0.05)], ids=short)
@pytest.mark.parametrize("steps", [12, 14])
def test_one_worker_is_diloco_with_one_worker_bit_for_bit(inner: Inner, steps: int) -> None:
    eager = simulate(cluster(EagerDiLoCo(period=4), 1, steps, task=NET, inner=inner))
    diloco = simulate(cluster(DiLoCo(period=4, outer=Nesterov(lr=0.4)), 1, steps, task=NET, inner=inner))
    assert torch.equal(eager.params[0], diloco.params[0])
    assert torch.equal(eager.slots[0]["momentum"], diloco.slots[0]["momentum"])


class Recorded(OuterSGD):
    """Keeps every outer gradient with the anchor that it is to move."""

    seen: Any = None

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        self.seen.append((anchor.clone(), gradient.clone()))
        super().step(anchor, gradient, momentum)


def test_identical_workers_step_on_a_mix_of_this_phase_and_the_last() -> None:
    """(D(t) + (M - 1) D(t - H)) / M, the closing step aside."""
    outer = Recorded(lr=0.5, seen=[])
    run = cluster(EagerDiLoCo(period=4, outer=outer), 3, 20, task={"name": "quadratic", "dimension": 8, "spread": 0.0})
    simulate(run)
    before = torch.zeros(8)
    for anchor, gradient in outer.seen[: 3 * 4 : 3]:
        fresh = anchor - quadratic(run).after_sgd(0, 0.1, 4, x0=anchor)
        assert torch.allclose(gradient, (fresh + 2 * before) / 3, atol=1e-6)
        before = fresh


class Sliding(EagerDiLoCo):
    """Every phase moves worker i by 1 + i, whatever the task; worker 1 begins late."""

    late_s: float = 0.0

    async def run(self, peer: Peer) -> None:
        async def slide(steps: int) -> int:
            done = await train(steps)
            if done:
                peer.params.copy_(peer.slot("anchor") - 1.0 - peer.id)
            return done

        train, peer.train = peer.train, slide  # type: ignore[method-assign]
        if peer.id == 1:
            await asyncio.sleep(self.late_s)
        await super().run(peer)


@pytest.mark.parametrize("phases", [1, 2, 5])
def test_constant_outer_gradients_make_it_diloco_but_for_the_first_round(phases: int) -> None:
    """The last step brings what the first lacked: as many means as phases, (1 + 2 + 3 + 4) / 4 each."""
    outcome = simulate(cluster(Sliding(period=3, outer=OuterSGD()), 4, 3 * phases))
    assert torch.allclose(replicas(outcome), torch.full((4, 16), 1.0 - 2.5 * phases), atol=1e-5)


def test_plain_outer_sgd_loses_nobodys_work() -> None:
    """All outer gradients are stepped on once in the end: replicas meet again."""
    rows = replicas(simulate(cluster(EagerDiLoCo(period=4, outer=OuterSGD()), 4, 20, task=NET)))
    assert torch.allclose(rows, rows[0].expand_as(rows), atol=1e-6)


def test_the_transfer_is_hidden_behind_the_next_phase() -> None:
    """A round takes about 0.25 s on this link, a phase 0.3 s: wall-clock is the larger of both, not their sum."""
    options = {"up_bps": 1e6, "down_bps": 1e6, "latency_s": 0.001}
    eager, diloco = (
        simulate(cluster(rule, 2, 60, task=BIG, **options))  # type: ignore[arg-type]
        for rule in (EagerDiLoCo(period=6), DiLoCo(period=6))
    )
    assert diloco.seconds > 60 * 0.05 + 10 * 0.19
    assert eager.seconds < 60 * 0.05 + 0.25  # the closing round


def test_a_skipped_round_is_sent_again_with_the_next() -> None:
    outcome = simulate(cluster(Sliding(period=4, outer=OuterSGD(), late_s=2.4), 3, 32, patience_s=1.0))
    kinds = [records[0].outcome for records in rounds(outcome).values()]
    assert kinds[0] == "skipped"
    assert kinds[-1] == "committed"
    assert torch.allclose(replicas(outcome), torch.full((3, 16), 1.0 - 2.0 * 8), atol=1e-5)


def test_survivors_go_on() -> None:
    outcome = simulate(cluster(EagerDiLoCo(period=4), 4, 24, events=[crash(0.5, 3)], detection_s=0.1))
    assert sorted(outcome.params) == [0, 1, 2]
    assert outcome.after["loss"] < outcome.before["loss"]
    assert {record.outcome for record in outcome.records if isinstance(record, Synced)} <= {"committed", "degraded"}


@pytest.mark.parametrize("codec", [Int8(), E3M0()], ids=short)
def test_coarse_codecs_stay_near_the_exact_one(codec: Int8 | E3M0) -> None:
    exact = simulate(cluster(EagerDiLoCo(period=4), 3, 24))
    coarse = simulate(cluster(EagerDiLoCo(period=4, codec=codec, all_reduce="gather"), 3, 24))
    assert not all_equal(coarse)
    assert coarse.after["loss"] < 1.1 * exact.after["loss"]
    assert not torch.equal(coarse.params[0], exact.params[0])


def test_robust_merges_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule.merge: from 'median' a worker cannot take its own part away"):
        EagerDiLoCo(merge=Median(), all_reduce="gather").check(3)


def test_timing_only_tells_the_same_story() -> None:
    run = cluster(EagerDiLoCo(period=4, codec=Int8()), 3, 20, task=BIG, speeds=(1.0, 0.7, 0.6))

    def story(outcome: Outcome) -> list[object]:
        return [(r.time_s, r.worker, r.sent_bytes) for r in outcome.records if isinstance(r, (Synced, Left))]

    assert story(simulate(run, timing_only=True)) == story(simulate(run))
