"""What fails beside a rule ends its worker at once, with that error: the rule itself may wait for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from sockets import train_here

from decentral.config import Run, validated
from decentral.journal import Evaluated
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.sim.simulate import simulate

World = Callable[[Run], Outcome]
WORLDS = pytest.mark.parametrize("world", [simulate, train_here])


class Mishap(Exception):
    """What no part of ours expects."""


async def fail() -> None:
    raise Mishap


class Spawns(SyncRule):
    """Something beside the rule fails, which waits for ever or goes on training."""

    name: ClassVar[str] = ""
    waits: bool

    async def run(self, peer: Peer) -> None:
        await peer.train(1)
        peer.spawn(fail())
        while self.waits or await peer.train(1):
            await asyncio.sleep(0.01)


class AwaitsInVain(SyncRule):
    """The rule awaits what fails beside it, and goes on as if nothing had been."""

    name: ClassVar[str] = ""

    async def run(self, peer: Peer) -> None:
        try:
            await peer.spawn(fail())
        except Mishap:
            await asyncio.Event().wait()


class Unspeakable(SyncRule):
    """The rule records what no report can carry, and waits for ever."""

    name: ClassVar[str] = ""

    async def run(self, peer: Peer) -> None:
        what: Any = Mishap()
        peer.record(Evaluated(time_s=peer.now(), worker=peer.id, step=0, metrics={"loss": what}))
        await asyncio.Event().wait()


def run_of(rule: SyncRule) -> Run:
    table = {
        "steps": 10**6,
        "batch_size": 1,
        "task": {"name": "quadratic"},
        "rule": rule,
        "fleet": {"workers": [{}]},
    }
    return validated(table, "test")


@WORLDS
@pytest.mark.parametrize("rule", [Spawns(waits=True), Spawns(waits=False), AwaitsInVain()])
def test_what_is_spawned_fails_its_worker_at_once(world: World, rule: SyncRule) -> None:
    with pytest.raises(Mishap):
        world(run_of(rule))


def test_a_report_that_cannot_be_made_fails_its_worker_at_once() -> None:
    with pytest.raises(TypeError, match="can not serialize 'Mishap' object"):
        train_here(run_of(Unspeakable()))
