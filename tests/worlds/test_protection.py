"""Runs with parity: who dies and comes back is what it was alone at the last generation, over sockets and simulated."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import cluster, crash
from sockets import Died, train_here

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.fleet import Event
from decentral.inner import AdamW
from decentral.journal import Restored
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import DiLoCo, SyncRule
from decentral.protocols.codecs import ErrorFeedback, TopK
from decentral.protocols.protection import ParityGroups
from decentral.sim.simulate import simulate

EVERY = 5
State = dict[str, bytes]


class Lives:
    """What workers were alone, by worker: at each generation, at every rest, as they died, and as they came back.

    With the latter goes the number of the last generation before.
    """

    def __init__(self, deaths: dict[int, int]) -> None:
        self.deaths = deaths
        self.begun = dict.fromkeys(range(4), 0)
        self.made: dict[int, dict[int, State]] = {worker: {} for worker in range(4)}
        self.rests: dict[int, list[State]] = {worker: [] for worker in range(4)}
        self.died: dict[int, list[State]] = {worker: [] for worker in range(4)}
        self.back: dict[int, list[tuple[int, State]]] = {worker: [] for worker in range(4)}


class Witness:
    """Keeps what a worker is alone; has it die in the last round before a generation, when it has made two."""

    def __init__(self, peer: Peer, lives: Lives) -> None:
        self._peer, self._lives = peer, lives
        self._made = 0
        self._last = -1 if lives.back[peer.id] else 0

    def rest(self) -> None:
        worker, lives, state = self._peer.id, self._lives, own(self._peer)
        lives.rests[worker].append(state)
        number, since = divmod(self._peer.rounds_settled.get("sync", 0), EVERY)
        if number != self._last:
            if self._last >= 0:  # a newcomer's first rest is too late for the generation before it
                lives.made[worker][number] = state
                self._made += 1
            self._last = number
        if self._made >= 2 and since == EVERY - 1 and lives.begun[worker] <= lives.deaths.get(worker, 0):
            lives.died[worker].append(state)
            raise Died


class Witnessed(DiLoCo):
    """DiLoCo whose workers have a witness."""

    lives: Any = None

    async def run(self, peer: Peer) -> None:
        if self.lives.begun[peer.id]:
            self.lives.back[peer.id].append((max(self.lives.made[peer.id]), own(peer)))
        self.lives.begun[peer.id] += 1
        peer.keepers.append(Witness(peer, self.lives))
        await super().run(peer)


def own(peer: Peer) -> State:
    state = {name: values.numpy().tobytes() for name, values in peer.own_state().items()}
    return {**state, "steps": str(peer.replica.inner_steps).encode()}


def moments(state: State) -> State:
    return {name: values for name, values in state.items() if name.startswith("inner ")}


def run_of(lives: Lives, workers: int, steps: int, events: tuple[Event, ...] = ()) -> Run:
    rule = Witnessed(period=3, codec=ErrorFeedback(codec=TopK()), all_reduce="gather", lives=lives)
    task = {"name": "quadratic", "dimension": 64, "noise": 0.5}
    run = cluster(rule, workers, steps, task=task, inner=AdamW(lr=0.01), events=events)
    return run.model_copy(update={"parity": ParityGroups(workers=workers, every=EVERY)})


def restored(outcome: Outcome) -> list[Restored]:
    return [record for record in outcome.records if isinstance(record, Restored)]


def test_who_dies_and_comes_back_has_what_was_its_alone_time_and_again() -> None:
    lives = Lives({1: 2})
    said = restored(train_here(run_of(lives, workers=3, steps=225), lives=3))
    assert [record.worker for record in said] == [1, 1]
    assert [record.generation for record in said] == [number for number, _ in lives.back[1]]
    for (generation, back), died in zip(lives.back[1], lives.died[1], strict=True):
        assert set(back) == {"inner exp_avg", "inner exp_avg_sq", "slot sync.0.residual", "steps"}
        assert back == lives.made[1][generation]
        assert back != died
        assert all(moments(back) not in map(moments, lives.rests[other]) for other in (0, 2))


def test_two_lost_at_once_go_on_as_their_hosts() -> None:
    lives = Lives({1: 1, 2: 1})
    said = restored(train_here(run_of(lives, workers=4, steps=135), lives=2))
    assert sorted((record.worker, record.generation) for record in said) == [(1, None), (2, None)]
    assert all("gone too" in record.reason or "no generation" in record.reason for record in said)
    for worker in (1, 2):
        ((_, back),) = lives.back[worker]
        assert any(moments(back) == moments(rest) for host in (0, 3) for rest in lives.rests[host])


def test_simulated_it_is_the_same() -> None:
    lives = Lives({})
    outcome = simulate(run_of(lives, 3, 180, (crash(8.0, 1), Event(at_s=9.0, kind="join", worker=1))))
    (said,) = restored(outcome)
    ((generation, back),) = lives.back[1]
    assert (said.worker, said.generation) == (1, generation)
    assert back == lives.made[1][generation]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"parity": {"workers": 5}}, "parity.workers: groups of 5, but the fleet has 4 workers"),
        ({"rule": "co2"}, "workers are never at rest together"),
        ({"rule": "sgp"}, "nobody who is lost can come back"),
        ({"rule": "ddp"}, "the inner optimiser takes the same steps everywhere"),
        ({"parity": {"workers": 1}}, "parity.workers"),
        ({"parity": {"workers": 2, "every": 0}}, "parity.every"),
    ],
)
def test_what_cannot_be_protected_is_refused(fields: dict[str, Any], words: str) -> None:
    rule: SyncRule = DiLoCo()
    with pytest.raises(ConfigError, match=words):
        validated({"rule": rule, "parity": {"workers": 4}, "fleet": {"workers": [{"count": 4}]}, **fields}, "run")
