"""Whoever is told in time that it must go leaves nothing behind: no residual and no sample, in both worlds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from cluster import STILL, cluster
from marks import Marks
from sockets import train_here
from torch import Tensor

from decentral.config import Run, validated
from decentral.journal import Trained
from decentral.outcome import Outcome
from decentral.peer import CALL, Peer
from decentral.protocols import DiLoCo, NoLoCo, SyncRule
from decentral.protocols.codecs import Codec, ErrorFeedback, Float32, Int8, TopK
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Schedule
from decentral.sim.simulate import simulate
from decentral.wire import signal

World = Callable[[Run], Outcome]
WORLDS = pytest.mark.parametrize("world", [simulate, train_here])

ROUNDS, LAST = 8, 3
SIZE = 64
EXACT = ErrorFeedback(codec=TopK(k=2, chunk=16, values=Float32()))
"""Whole numbers stay whole under it: what adds up does so exactly."""


def brought(worker: int, number: int) -> Tensor:
    """Return whole numbers that belong to the worker and the round, [SIZE]."""
    generator = torch.Generator().manual_seed(100 * worker + number)
    return torch.randint(-50, 50, (SIZE,), generator=generator).float()


class Bringing(AllReduceRule):
    """Each round is of whole numbers; some leave after round `LAST`, when 2 or 4 are left, whose mean is exact."""

    leaving: tuple[int, ...] = ()

    async def run(self, peer: Peer) -> None:
        heard = peer.slot("heard")  # the sum of what all have sent
        while await peer.train(1):
            mean = await self.agreed_mean(peer, brought(peer.id, peer.step))
            assert mean is not None
            heard.add_(mean, alpha=4 if peer.step <= LAST else 4 - len(self.leaving))
            if peer.step == LAST and peer.id in self.leaving:
                peer.leave()


def handed_in(leaving: tuple[int, ...]) -> Tensor:
    """Return the sum of all that all workers bring."""
    return sum(
        (
            brought(worker, number)
            for worker in range(4)
            for number in range(1, 1 + (LAST if worker in leaving else ROUNDS))
        ),
        torch.zeros(SIZE),
    )


@WORLDS
@pytest.mark.parametrize("leaving", [(), (1, 2), (2, 3), (0, 3)])
def test_what_was_sent_and_what_is_kept_are_what_was_handed_in(world: World, leaving: tuple[int, ...]) -> None:
    """Two leave at once, so that the first whom one asks is about to go too."""
    rule = Bringing(codec=EXACT, all_reduce="gather", leaving=leaving)
    outcome = world(cluster(rule, steps=ROUNDS, task={**STILL, "dimension": SIZE}))
    assert sorted(outcome.params) == [worker for worker in range(4) if worker not in leaving]
    heard = next(iter(outcome.slots.values()))["heard"]
    kept = sum((slots["sync.0.residual"] for slots in outcome.slots.values()), torch.zeros(SIZE))
    assert heard.abs().sum() > 0
    assert kept.abs().sum() > 0
    assert (heard + kept).equal(handed_in(leaving))


class Telling(Schedule):
    """So many steps a round; tells a worker to go as soon as it trains again from a step on."""

    worker: int
    step: int
    period: int = 10
    within_s: float = math.inf

    def steps(self, peer: Peer) -> int:
        if (peer.id, peer.step) == (self.worker, self.step):
            asyncio.get_running_loop().call_soon(peer.leave, self.within_s)
        return self.period


TOLD = Telling(worker=1, step=30)
RULES = {
    "diloco": DiLoCo(period=TOLD),
    "diloco with feedback": DiLoCo(period=TOLD, codec=ErrorFeedback(codec=Int8())),
    "noloco": NoLoCo(period=TOLD),
}


@WORLDS
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_who_is_told_in_the_midst_of_local_steps_hands_them_in_before_it_goes(world: World, rule: SyncRule) -> None:
    outcome = world(marked(rule))
    (reason,) = [left.reason for left in outcome.left() if left.worker == 1]
    assert reason == "preempted"
    found = outcome.coverage()
    assert found.repeated == ()
    settled = torch.ones(found.samples, dtype=torch.bool)
    for start, stop in found.missing:  # what worker 1 had leased ahead, if nobody wanted it any more
        settled[start:stop] = False
    trained = sum(record.samples for record in outcome.records if isinstance(record, Trained))
    assert settled.sum() == trained == 2 * 60 * 4 + 40 * 4  # two worked to the end, the third to the end of its phase
    assert (outcome.merged()[: found.samples] != 0).equal(settled)


class Paced(Marks):
    """Each batch takes 5 ms."""

    name: ClassVar[str] = ""

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        time.sleep(0.005)
        return super().batch(worker, start, size)


PACED = {"name": "test_notices_lose_nothing:Paced"}


@pytest.mark.parametrize("codec", [Float32(), ErrorFeedback(codec=Int8())], ids=["float32", "feedback"])
def test_a_phase_longer_than_the_notice_ends_early_for_all(codec: Codec) -> None:
    """Over real sockets; tests/sim/test_sample_leases.py has it in virtual time. A phase takes a second at least."""
    rule = DiLoCo(period=Telling(worker=1, step=200, period=200, within_s=0.4), codec=codec)
    outcome = train_here(marked(rule, steps=500, batch_size=1, task=PACED))
    phases = [
        [record.steps for record in outcome.records if isinstance(record, Trained) and record.worker == worker]
        for worker in range(3)
    ]
    assert [steps[0] for steps in phases] == [200] * 3
    assert all(0 < steps[1] < 200 for steps in phases)
    assert len(phases[1]) == 2
    assert [left.reason for left in outcome.left() if left.worker == 1] == ["preempted"]
    found = outcome.coverage()
    assert found.repeated == ()
    settled = sum(map(sum, phases))
    assert settled == found.samples - sum(stop - start for start, stop in found.missing)
    assert (outcome.merged() != 0).sum() == settled


class Calling(DiLoCo):
    """DiLoCo whose worker 1 calls the others before each of its phases, and does not leave."""

    async def run(self, peer: Peer) -> None:
        def call() -> None:
            for worker in (0, 2):
                peer.send(worker, CALL, signal(""))

        if peer.id == 1:
            peer.tell_speed = call  # type: ignore[method-assign]
        await super().run(peer)


class Calls(Schedule):
    """Fifty steps."""

    def steps(self, peer: Peer) -> int:
        peer.tell_speed()
        return 50


def test_who_calls_again_and_again_is_heeded_once() -> None:
    outcome = train_here(marked(Calling(period=Calls()), steps=150, batch_size=1, task=PACED))
    short = [
        record for record in outcome.records if isinstance(record, Trained) and record.worker == 0 and record.steps < 50
    ]
    assert len(short) <= 2  # the phase that the call cut, and the last one, which has what is left


def marked(rule: SyncRule, **fields: Any) -> Run:
    """Return a run of three workers whose model shows which samples are in it."""
    table = {
        "rule": rule,
        "leases": True,
        "steps": 60,
        "batch_size": 4,
        "evaluate_every": 0,
        "task": {"name": "marks:Marks"},
        "inner": {"name": "sgd", "lr": 1.0},
        "fleet": {"workers": [{"count": 3}]},
    }
    return validated({**table, **fields}, "test")
