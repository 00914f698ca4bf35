"""Workers that come into a run that has begun: they take over a state, hear what they miss, and then take part."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import Event, Fleet, WorkerGroup
from decentral.journal import Joined, Refused, Synced, Trained
from decentral.members import Members
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import (
    CO2,
    DDP,
    DESLOC,
    AsyncLocalSGD,
    DiLoCo,
    FedBuff,
    FedCompass,
    Gossip,
    Int8,
    LocalSGD,
    NoLoCo,
    SparseLoCo,
    StreamingDiLoCo,
    SyncRule,
    joining,
)
from decentral.protocols.codecs import EF21, ErrorFeedback, PowerSGD, TopK
from decentral.protocols.collectives import SEGMENT
from decentral.protocols.joining import HEAD, Host, _Guest, _part, host_for, segments_of
from decentral.report.summary import summarize, summary_table
from decentral.sim.simulate import simulate
from decentral.sim.world import SimWorld
from decentral.snapshot import Snapshot
from decentral.wire import signal

EQUAL: dict[str, SyncRule] = {
    "ddp": DDP(),
    "diloco": DiLoCo(period=3),
    "diloco int8 ring": DiLoCo(period=3, codec=Int8(), all_reduce="ring"),
    "diloco topk": DiLoCo(period=3, codec=ErrorFeedback(codec=TopK()), all_reduce="gather"),
    "diloco by samples": DiLoCo(period=3, weighted=True),
    "local_sgd": LocalSGD(period=4),
    "sparse_loco": SparseLoCo(period=3),
    "des_loc": DESLOC(period=2, codec=Int8()),
    "streaming_diloco": StreamingDiLoCo(period=6, overlap=2),
}
"""Rules that end with equal replicas."""
SERVED: dict[str, SyncRule] = {
    "async_local_sgd": AsyncLocalSGD(period=3, lr=0.3, momentum=0.5),
    "async_local_sgd topk": AsyncLocalSGD(period=3, lr=0.3, momentum=0.5, codec=ErrorFeedback(codec=TopK())),
    "fedbuff": FedBuff(period=3, buffer=2),
    "fedcompass": FedCompass(period=6, ratio=2),
}
"""Rules with a server."""
AT_ONCE: dict[str, SyncRule] = {"gossip": Gossip(period=3), "noloco": NoLoCo(period=3)}


def run_of(
    rule: SyncRule,
    *events: Event,
    workers: Sequence[WorkerGroup] = (WorkerGroup(count=4),),
    steps: int = 40,
    dimension: int = 64,
    patience_s: float = 20.0,
    **fleet: object,
) -> Run:
    inner = {"name": "adamw", "lr": 0.05} if isinstance(rule, DESLOC) else {"name": "sgd", "lr": 0.1, "momentum": 0.5}
    return Run.model_validate(
        {
            "rule": rule,
            "steps": steps,
            "batch_size": 1,
            "evaluate_every": 10,
            "patience_s": patience_s,
            "task": {"name": "quadratic", "dimension": dimension, "noise": 0.3},
            "inner": inner,
            "fleet": Fleet.model_validate({"workers": tuple(workers), "events": events, "detection_s": 0.1, **fleet}),
        }
    )


def crash(at_s: float, worker: int) -> Event:
    return Event(at_s=at_s, kind="crash", worker=worker)


def join(at_s: float, worker: int) -> Event:
    return Event(at_s=at_s, kind="join", worker=worker)


def stays(outcome: Outcome, worker: int) -> list[str]:
    return [left.reason for left in outcome.left() if left.worker == worker]


def distinct(replicas: dict[int, Tensor]) -> int:
    return len({values.numpy().tobytes() for values in replicas.values()})


@pytest.mark.parametrize("rule", EQUAL.values(), ids=list(EQUAL))
@pytest.mark.parametrize(("gone_s", "back_s"), [(0.5, 0.9), (0.3, 0.31), (0.62, 1.4)])
def test_who_comes_back_ends_with_the_same_bits_as_everybody(rule: SyncRule, gone_s: float, back_s: float) -> None:
    outcome = simulate(run_of(rule, crash(gone_s, 2), join(back_s, 2)))
    assert stays(outcome, 2) == ["crashed", "finished"]
    assert sorted(outcome.params) == [0, 1, 2, 3]
    assert distinct(outcome.params) == 1
    rounds = [record for record in outcome.records if isinstance(record, Synced)]
    assert "skipped" not in {record.outcome for record in rounds}
    took_part = [record for record in rounds if record.worker == 2 and record.time_s > back_s and 2 in record.members]
    assert took_part, "it never took part"
    last = max(record.time_s for record in rounds)
    assert {len(record.members) for record in rounds if record.time_s == last} == {4}


@pytest.mark.parametrize("rule", AT_ONCE.values(), ids=list(AT_ONCE))
def test_in_gossip_who_comes_back_goes_on_from_its_hosts_model(rule: SyncRule) -> None:
    outcome = simulate(run_of(rule, crash(0.5, 2), join(0.9, 2)))
    assert stays(outcome, 2) == ["crashed", "finished"]
    begun = next(r for r in outcome.records if isinstance(r, Trained) and r.worker == 2 and r.time_s > 0.9)
    assert begun.step > 6  # where the others are, not where it was
    assert any(
        isinstance(r, Synced) and r.worker == 2 and r.time_s > 0.9 and len(r.members) > 1 for r in outcome.records
    )
    others = torch.stack([outcome.params[worker] for worker in (0, 1, 3)])
    assert (outcome.params[2] - others.mean(dim=0)).norm() < 2 * (others - others.mean(dim=0)).norm(dim=1).max()


def pushers(outcome: Outcome, since_s: float) -> set[tuple[str, int]]:
    """Return the servers' channels and the workers whose pushes they took after that time."""
    rounds = [record for record in outcome.records if isinstance(record, Synced) and record.time_s > since_s]
    return {(record.channel, worker) for record in rounds for worker in record.members}


@pytest.mark.parametrize("rule", SERVED.values(), ids=list(SERVED))
@pytest.mark.parametrize(("gone_s", "back_s"), [(0.5, 0.9), (0.3, 0.31), (0.62, 1.4)])
def test_at_a_server_who_comes_back_pushes_again_and_ends_with_everybodys_model(
    rule: SyncRule, gone_s: float, back_s: float
) -> None:
    quiet = simulate(run_of(rule, steps=60))
    outcome = simulate(run_of(rule, crash(gone_s, 2), join(back_s, 2), steps=60))
    assert stays(outcome, 2) == ["crashed", "finished"]
    assert ("server 0", 2) in pushers(outcome, back_s)
    assert sorted(outcome.params) == [0, 1, 2, 3]
    assert distinct(outcome.params) == 1
    progress = (quiet.before["loss"] - outcome.after["loss"]) / (quiet.before["loss"] - quiet.after["loss"])
    assert 0.8 < progress < 1.2, "one of four was away for less than a quarter of the time"


@pytest.mark.parametrize("rule", SERVED.values(), ids=list(SERVED))
def test_a_server_that_is_back_is_a_worker_like_others(rule: SyncRule) -> None:
    """Worker 1 serves on, though it is not the lowest any more; then the lowest of those who never left."""
    outcome = simulate(run_of(rule, crash(0.5, 0), join(0.9, 0), crash(1.9, 1), join(2.1, 1), steps=80))
    assert stays(outcome, 0) == stays(outcome, 1) == ["crashed", "finished"]
    assert ("server 1", 0) in pushers(outcome, 0.9)
    assert {("server 2", 0), ("server 2", 1)} <= pushers(outcome, 2.1)
    assert distinct(outcome.params) == 1


def test_when_all_who_began_have_gone_those_who_came_serve() -> None:
    rule = SERVED["async_local_sgd"]
    events = [crash(0.5, 0), join(0.9, 0), crash(1.4, 1), join(1.6, 1), crash(2.2, 2), crash(2.2, 3)]
    outcome = simulate(run_of(rule, *events, steps=100))
    assert sorted(outcome.params) == [0, 1]
    assert {("server 0.1", 0), ("server 0.1", 1)} <= pushers(outcome, 2.4)
    assert distinct(outcome.params) == 1


@pytest.mark.parametrize("seed", range(16))
def test_whatever_comes_and_goes_at_servers_nobody_waits_for_ever(seed: int) -> None:
    chance = random.Random(seed)
    rule = SERVED[chance.choice(sorted(SERVED))]
    size = chance.randint(3, 6)
    events = [
        Event(at_s=round(chance.uniform(0, 3), 3), kind=chance.choice(["crash", "join"]), worker=chance.randrange(size))
        for _ in range(chance.randint(2, 10))
    ]
    events = [event for event in events if event.kind == "join" or event.worker != size - 1]  # one is always there
    line = chance.choice([1e4, 1e5, 1e8])
    run = run_of(
        rule,
        *events,
        workers=[WorkerGroup(speed=chance.choice([1, 0.7])) for _ in range(size)],
        patience_s=chance.choice([3, 20]),
        up_bps=line,
        down_bps=line,
        jitter=chance.choice([0, 0.2]),
        detection_s=chance.choice([0.05, 0.5, 2]),
    )
    outcome = simulate(run)
    assert stays(outcome, size - 1)[-1] == "finished"
    assert {(r.time_s, r.worker, r.kind) for r in outcome.records} == {
        (r.time_s, r.worker, r.kind) for r in simulate(run).records
    }


def test_rounds_go_on_while_the_newcomer_takes_its_state() -> None:
    """On a thin line the state takes several rounds: one passes meanwhile, then the host waits until it is heard."""
    rule = DiLoCo(period=10, codec=Int8())
    thin = {"up_bps": 1e6, "down_bps": 1e6}
    quiet = simulate(run_of(rule, crash(0.1, 3), steps=120, dimension=20_000, **thin))
    joined = simulate(run_of(rule, crash(0.1, 3), join(0.6, 3), steps=120, dimension=20_000, **thin))
    first = next(r for r in joined.records if isinstance(r, Synced) and 3 in r.members and r.time_s > 0.6)
    rounds = [r for r in joined.records if isinstance(r, Synced) and r.worker == 0 and 0.6 < r.time_s < first.time_s]
    assert [r.round for r in rounds] == [1, 2, 3]  # one before it asked, one on the way, and one that it heard
    assert joined.seconds < 1.45 * quiet.seconds
    assert distinct(joined.params) == 1


def test_a_host_that_gets_far_ahead_waits_for_its_guest() -> None:
    """Data parallelism has a round a step: without a bound the means would pile up at the newcomer."""
    run = run_of(DDP(), crash(0.1, 3), join(0.5, 3), steps=60, dimension=20_000, up_bps=1e7, down_bps=1e7)
    outcome = simulate(run)
    assert stays(outcome, 3) == ["crashed", "finished"]
    assert distinct(outcome.params) == 1
    assert any(isinstance(r, Synced) and r.members == (0, 1, 2, 3) and r.time_s > 0.5 for r in outcome.records)


def test_late_starters_and_two_at_once() -> None:
    groups = (WorkerGroup(count=2), WorkerGroup(count=2, start_s=0.7), WorkerGroup(start_s=1.1))
    outcome = simulate(run_of(DiLoCo(period=3), workers=groups))
    assert [record.time_s for record in outcome.records if isinstance(record, Joined)] == [0, 0, 0.7, 0.7, 1.1]
    assert sorted(outcome.params) == [0, 1, 2, 3, 4]
    assert distinct(outcome.params) == 1


def test_time_alone_is_the_same() -> None:
    run = run_of(DiLoCo(period=3), crash(0.5, 2), join(0.9, 2))
    run = run.model_copy(update={"evaluate_every": 0, "norm_limit": 0.0})  # phantoms have no norms to hand over

    def times(outcome: Outcome) -> list[tuple[float, int, str]]:
        return [(r.time_s, r.worker, r.kind) for r in outcome.records]

    assert times(simulate(run, timing_only=True)) == times(simulate(run))


def test_the_closing_table_has_a_line_for_each_stay() -> None:
    run = run_of(DiLoCo(period=3), crash(0.5, 2), join(0.9, 2), prices={"egress_dollars_per_gb": 0.1})
    summary = summarize(run, run.make_task(), simulate(run))
    assert [(row["worker"], row["reason"]) for row in summary["workers"] if row["worker"] in (1, 2)] == [
        (1, "finished"),
        (2, "crashed"),
        (2, "finished"),
    ]
    assert summary_table(summary).row_count == 5


def test_a_newcomer_whose_host_dies_finds_another_one() -> None:
    for gone_s in (0.62, 0.7, 0.8, 0.95):
        hosts = (crash(gone_s, 0), crash(gone_s, 1))
        outcome = simulate(run_of(DiLoCo(period=3), crash(0.3, 3), join(0.6, 3), *hosts, dimension=2000, up_bps=1e6))
        assert stays(outcome, 3)[-1] == "finished"
        assert distinct(outcome.params) == 1


def test_a_host_hands_on_what_it_only_hears_itself() -> None:
    """Worker 1 takes part in the rounds of parameters, not yet in those of the means, when it lets worker 2 in."""
    for back_s in (0.9, 1.1, 1.3, 1.51, 1.7):
        groups = (WorkerGroup(), WorkerGroup(start_s=0.567), WorkerGroup(start_s=0.7))
        rule = DESLOC(period=2)
        outcome = simulate(run_of(rule, crash(0.897, 2), join(back_s, 2), workers=groups, patience_s=3.0))
        assert stays(outcome, 2)[-1] == "finished"
        assert distinct(outcome.params) == 1


@pytest.mark.parametrize("seed", range(60))
def test_whatever_comes_and_goes_the_run_ends_and_replicas_agree(seed: int) -> None:
    chance = random.Random(seed)
    rule = chance.choice([rule for name, rule in EQUAL.items() if name != "streaming_diloco"])  # may end on a skip
    size = chance.randint(3, 6)
    events = [
        Event(
            at_s=round(chance.uniform(0, 3), 3), kind=chance.choice(["crash", "join"]), worker=chance.randrange(1, size)
        )
        for _ in range(chance.randint(2, 8))
    ]
    groups = [
        WorkerGroup(speed=chance.choice([1, 0.7]), start_s=chance.choice([0, 0.7]) if i else 0) for i in range(size)
    ]
    line = chance.choice([1e4, 1e5, 1e8])
    run = run_of(
        rule,
        *events,
        workers=groups,
        patience_s=chance.choice([3, 20]),
        up_bps=line,
        down_bps=line,
        jitter=chance.choice([0, 0.2]),
        detection_s=chance.choice([0.05, 0.5, 2]),
    )
    outcome = simulate(run)
    last = [record for record in outcome.records if isinstance(record, Synced)][-1]
    assert distinct(outcome.params) == 1 or last.outcome == "skipped"
    assert line < 1e5 or last.outcome != "skipped"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (CO2(period=2), "'co2' cannot take a worker into a run that has begun"),
        (DiLoCo(codec=EF21(codec=TopK()), all_reduce="gather"), "builds on what all workers have sent before"),
        (DDP(codec=PowerSGD()), "builds on what all workers have sent before"),
    ],
)
def test_rules_and_codecs_that_cannot_take_newcomers_are_refused(rule: SyncRule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(rule, join(1.0, 2)).check()


def test_a_fleet_of_late_starters_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="somebody must begin the run"):
        run_of(DiLoCo(), workers=(WorkerGroup(count=2, start_s=1.0),)).check()


@pytest.mark.parametrize("head", ["no JSON", "[]", '{"step": 3}', '{"step": -1, "rounds": {}, "tensors": []}'])
def test_hosts_that_talk_nonsense_cost_the_newcomer_and_nobody_else(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks them all, one after the other, and does not come again: all of them talk nonsense."""
    asked = []

    async def give(host: Host, worker: int, guest: _Guest, state: object) -> None:
        asked.append(host._peer.id)
        host._peer.send(worker, _part(guest.since, HEAD), signal(head))

    monkeypatch.setattr(Host, "_give", give)
    outcome = simulate(run_of(DiLoCo(period=3), Event(at_s=0.5, worker=1), join(1.0, 1)))
    assert sorted(outcome.params) == [0, 2, 3]
    assert sorted(asked) == [0, 2, 3]
    assert any("gave a state that cannot be read" in left.reason for left in outcome.left() if left.worker == 1)


THIN = {"dimension": 20_000, "up_bps": 1e6, "down_bps": 1e6, "steps": 120}
"""Lines on which a state takes seconds: whoever comes at 0.6 s is taking it at 2 s."""


def notice(at_s: float, worker: int, notice_s: float) -> Event:
    return Event(at_s=at_s, kind="preempt", worker=worker, notice_s=notice_s)


@pytest.mark.parametrize("rule", [DiLoCo(period=10), Gossip(period=10)], ids=["diloco", "gossip"])
def test_who_takes_the_state_of_a_host_that_dies_takes_anothers_in_the_same_life(rule: SyncRule) -> None:
    outcome = simulate(run_of(rule, crash(0.1, 3), join(0.6, 3), crash(2.0, 0), **THIN))
    assert stays(outcome, 3) == ["crashed", "finished"]
    assert any(isinstance(r, Synced) and r.worker == 3 and r.time_s > 2 and len(r.members) > 1 for r in outcome.records)


def test_when_all_hosts_die_as_they_give_their_state_the_newcomer_says_so() -> None:
    deaths = [crash(2.0, worker) for worker in range(3)]
    with pytest.raises(ConfigError, match="nobody is left who could give it a state: its host, worker 0, has left"):
        simulate(run_of(Gossip(period=10), crash(0.1, 3), join(0.6, 3), *deaths, **THIN))


@pytest.mark.parametrize("at_s", [0.65, 2.0, 5.0])
def test_a_newcomer_that_is_told_to_leave_goes_at_once_and_does_not_come_again(at_s: float) -> None:
    """While it waits for the host's rest, while the state comes, while it follows."""
    told = notice(at_s, 3, notice_s=30)
    outcome = simulate(run_of(DiLoCo(period=10, codec=Int8()), crash(0.1, 3), join(0.6, 3), told, **THIN))
    assert [(left.time_s, left.reason) for left in outcome.left() if left.worker == 3][1:] == [(at_s, "preempted")]
    assert sorted(outcome.params) == [0, 1, 2]


def test_who_is_about_to_leave_sends_newcomers_to_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the midst of a phase, whose end is a second away for all."""
    gave = []
    give = Host._give

    def noted(host: Host, *asked: Any) -> Any:
        gave.append(host._peer.id)
        return give(host, *asked)

    monkeypatch.setattr(Host, "_give", noted)
    events = (crash(0.1, 2), crash(0.1, 3), notice(0.5, 0, notice_s=60), join(1.0, 3), join(1.5, 2))
    outcome = simulate(run_of(Gossip(period=50), *events, steps=300))
    assert stays(outcome, 2)[-1] == stays(outcome, 3)[-1] == "finished"
    assert gave
    assert 0 not in gave


@pytest.mark.parametrize("rule", [Gossip(period=50), DiLoCo(period=50)], ids=["gossip", "diloco"])
def test_a_state_is_given_in_the_midst_of_a_phase_and_the_phase_goes_on(
    rule: SyncRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is at its 21st step of 50 ms; the phase lasts until 2.5 s, and its other steps are as they would be."""
    given: list[tuple[float, int]] = []
    snapshot = Peer.snapshot

    def noted(peer: Peer) -> Snapshot:
        given.append((peer.now(), peer.step))
        return snapshot(peer)

    monkeypatch.setattr(Peer, "snapshot", noted)
    fleet = {"latency_s": 1e-3, "workers": [WorkerGroup(count=3)], "steps": 150}
    quiet, joined = (
        simulate(run_of(rule, crash(0.1, 2), **fleet)),
        simulate(run_of(rule, crash(0.1, 2), join(1.02, 2), **fleet)),
    )
    assert given == [(pytest.approx(1.05), 0)]
    for worker in (0, 1):
        first, same = (
            next(record for record in outcome.records if isinstance(record, Trained) and record.worker == worker)
            for outcome in (quiet, joined)
        )
        assert (same.step, same.time_s) == (50, pytest.approx(2.5)) == (first.step, first.time_s)
        assert same.loss == pytest.approx(first.loss)
    begun = next(r for r in joined.records if isinstance(r, Trained) and r.worker == 2 and r.samples)
    assert begun.time_s - begun.seconds < (1.2 if isinstance(rule, Gossip) else 2.6)


def test_who_comes_when_all_are_about_to_leave_waits_until_they_have_gone() -> None:
    """It does not ask over and over: worker 0 goes at the end of its phase, at 1 s, and is known to have gone then."""
    events = (crash(0.1, 1), notice(0.2, 0, notice_s=60), join(0.3, 1))
    with pytest.raises(ConfigError, match=r"worker 1, went at 1(\.0*1?)? s .*nobody is left who could give it a state"):
        simulate(run_of(Gossip(period=10), *events, workers=[WorkerGroup(count=2)], steps=100, step_time_s=0.1))


def test_two_who_ask_before_the_same_rest_share_one_copy_and_its_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Snapshot] = []
    hashed: list[int] = []
    snapshot, of = Peer.snapshot, joining.digest

    def noted_snapshot(peer: Peer) -> Snapshot:
        copies.append(snapshot(peer))
        return copies[-1]

    def noted_digest(values: Sequence[Tensor]) -> int:
        hashed.append(values[0].data_ptr())
        return of(values)

    monkeypatch.setattr(Peer, "snapshot", noted_snapshot)
    monkeypatch.setattr(joining, "digest", noted_digest)
    groups = (WorkerGroup(), WorkerGroup(count=2, start_s=0.65))
    outcome = simulate(run_of(DiLoCo(period=10), workers=groups, steps=120))
    (copy,) = copies
    assert [hashed.count(values.data_ptr()) for values in copy.tensors.values()] == [1] * len(copy.tensors)
    assert distinct(outcome.params) == 1


def test_a_life_gets_its_own_state_while_the_one_for_the_life_before_is_still_being_coded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first life dies while the host codes a segment for it, and the host has heard from the second one then."""

    async def aside(world: SimWorld, peer: Peer, numel: int, work: Callable[[], object]) -> object:
        await asyncio.sleep(1.5)
        return work()

    monkeypatch.setattr(SimWorld, "aside", aside)
    events = (crash(0.1, 3), join(0.6, 3), crash(1.2, 3), join(1.3, 3))
    outcome = simulate(run_of(DiLoCo(period=10), *events, steps=400, dimension=70_000))
    assert stays(outcome, 3) == ["crashed", "crashed", "finished"]
    assert distinct(outcome.params) == 1
    assert "duplicate" not in {record.code for record in outcome.records if isinstance(record, Refused)}


def test_a_state_is_cut_into_segments_that_cover_it_once() -> None:
    size = 2 * SEGMENT + 5
    found = segments_of([("params", size), ("slot", 3), ("nothing", 0)])
    assert found == [
        ("params", 0, SEGMENT),
        ("params", SEGMENT, 2 * SEGMENT),
        ("params", 2 * SEGMENT, size),
        ("slot", 0, 3),
    ]


def test_the_host_takes_part_has_the_fewest_guests_has_stayed_and_comes_next() -> None:
    members = Members(0, tuple(range(5)))
    assert [host_for(newcomer, members, {}) for newcomer in (0, 3, 4)] == [1, 4, 0]
    assert host_for(3, members.without(4).with_guest(4), {}) == 0  # a guest has nothing to give
    back = members.without(4).with_guest(4).admitting(4, "")
    assert host_for(3, back, {}) == 0  # it takes part, but has left once
    two = members.without(2).without(3).with_guest(2)
    assert host_for(3, two, {2: 4}) == 0  # 4 has a guest to look after
    assert host_for(3, two, {2: 4}, asked=(0, 1)) == 4
    assert host_for(3, two, {2: 4}, asked=(0, 1, 4)) is None
    assert host_for(3, two.admitting(2, ""), {2: 4}, asked=(0, 1)) == 4  # who takes part needs no host
