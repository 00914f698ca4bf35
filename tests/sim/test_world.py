"""What users rely on in the simulated world: it repeats itself, it adds up, and it tells what befell whom."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lean_runs import check_equal

from decentral.config import Run, validated
from decentral.errors import PeerGone
from decentral.journal import Joined, Left, Record, Synced, Trained
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import RULES, SyncRule
from decentral.protocols.topology import RandomGroups
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch
from decentral.wire import Header, HeaderSizes, Packet, Tag, pack_header, signal

STEP_S = 0.05
LATENCY_S = 0.02


def make_run(rule: str | dict[str, Any] | SyncRule, *, workers: int = 4, steps: int = 20, **options: Any) -> Run:
    """Return a short run of a small task; `fleet` and other sections of a run file go into `options`."""
    fields: Any = rule
    if isinstance(rule, str):
        short = {"period": 5, "samples": 4}
        fields = {"name": rule, **{name: short[name] for name in short if name in RULES[rule].model_fields}}
    fleet = {"workers": [{"count": workers}], "step_time_s": STEP_S, "latency_s": LATENCY_S, **options.pop("fleet", {})}
    inner = {"name": "sgd", "lr": 0.1}
    table = {"steps": steps, "evaluate_every": 0, "task": {"name": "quadratic"}, "inner": inner, "rule": fields}
    return validated({**table, "fleet": fleet, **options}, "test")


def lines(outcome: Outcome) -> list[str]:
    return [record.to_json() for record in outcome.records]


def without_loss(record: Record) -> str:
    if isinstance(record, Trained):
        record.loss = None
    return record.to_json()


def rounds(outcome: Outcome) -> list[Synced]:
    return [record for record in outcome.records if isinstance(record, Synced)]


UNEVEN = {"workers": [{"count": 2}, {"count": 2, "speed": 0.5, "up_bps": 1e6}], "jitter": 0.3}
CRASH = {"events": [{"at_s": 0.4, "worker": 1}], "detection_s": 0.3}


# The same run is the same run.


@pytest.mark.parametrize("timing_only", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_same_seed_same_journal_byte_for_byte(rule: str, timing_only: bool) -> None:
    run = make_run(rule, fleet={**UNEVEN, **CRASH})
    first, second = (simulate(run, timing_only=timing_only) for _ in range(2))
    assert lines(first) == lines(second)
    assert first.params.keys() == second.params.keys()
    assert all(first.params[worker].equal(second.params[worker]) for worker in first.params)


@pytest.mark.parametrize("timing_only", [False, True])
def test_another_seed_is_another_run(timing_only: bool) -> None:
    runs = [make_run("noloco", fleet=UNEVEN, seed=seed) for seed in (0, 1)]
    first, second = (lines(simulate(run, timing_only=timing_only)) for run in runs)
    assert first != second


def test_journal_does_not_depend_on_the_process() -> None:
    # Another process hashes strings otherwise and puts objects elsewhere: nothing may follow the order of a set.
    program = "from test_world import *; print(*lines(simulate(make_run('diloco', fleet=UNEVEN))), sep='\\n')"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    place = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == lines(simulate(make_run("diloco", fleet=UNEVEN)))


@pytest.mark.parametrize(("jitter", "events"), [(0.0, {}), (0.3, CRASH)])
@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("dbw", "pbt")])  # they go by losses: none here
def test_timing_only_agrees_with_real_training(rule: str, jitter: float, events: dict[str, Any]) -> None:
    run = make_run(rule, fleet={**UNEVEN, "jitter": jitter, **events})
    real, timing = simulate(run), simulate(run, timing_only=True, watch=Watch(links=True))  # by messages
    assert [without_loss(record) for record in real.records] == lines(timing)
    assert real.seconds == timing.seconds
    check_equal(simulate(run, timing_only=True), timing, within_s=1e-9)  # without them, where that can be


def test_observer_sees_every_record_as_it_is_made() -> None:
    seen: list[Record] = []
    outcome = simulate(make_run("gossip"), timing_only=True, on_record=seen.append)
    assert seen == list(outcome.records)


# What happens.


def test_lockstep_rounds_take_what_compute_links_and_latency_say() -> None:
    # Pairs: 5 steps, the data, the verdict. Data and verdict are alone on their links, both ways at once.
    bps = 1e6
    outcome = simulate(make_run("gossip", workers=2, steps=5, fleet={"up_bps": bps, "down_bps": bps}))
    data = len(pack_header(Header(0, 0, Tag("pair", 1, "x"), "float32", 16, 64))) + 64
    verdict = len(pack_header(Header(0, 0, Tag("pair", 1, "v"), "signal", 0, 2))) + 2
    assert outcome.seconds == pytest.approx(5 * STEP_S + 8 * (data + verdict) / bps + 2 * LATENCY_S, rel=1e-12)
    assert [left.sent_bytes for left in outcome.left()] == [data + verdict] * 2
    assert [left.messages_sent for left in outcome.left()] == [2, 2]


class Coding(SyncRule):
    """Each worker has pieces of some sizes coded, all handed over at once; its rounds end as they are done."""

    pieces: tuple[int, ...]

    async def run(self, peer: Peer) -> None:
        async def coded(number: int, numel: int) -> None:
            await peer.aside(numel, lambda: peer.ended_round(f"piece {number}", 1, "committed", [peer.id]))

        await asyncio.gather(*(coded(number, numel) for number, numel in enumerate(self.pieces, 1)))


def test_a_worker_codes_one_piece_after_the_other_at_its_own_pace() -> None:
    large, small = 2_000_000, 1000  # the small one is not worth the way to another thread
    run = make_run(
        Coding(pieces=(large, small, large)),
        fleet={"workers": [{}, {"coding_bps": 8e8}], "coding_bps": 1.6e9},
    )
    ended = {(record.worker, record.channel): record.time_s for record in rounds(simulate(run, timing_only=True))}
    for worker, bps in enumerate((1.6e9, 8e8)):
        piece_s = 32 * large / bps
        assert ended[worker, "piece 1"] == pytest.approx(piece_s)
        assert ended[worker, "piece 2"] == 0.0
        assert ended[worker, "piece 3"] == pytest.approx(2 * piece_s)


@pytest.mark.parametrize(
    ("all_reduce", "vectors"),
    [
        # Each of two encodes the other's half; decodes two halves, encodes their mean and decodes it; decodes the
        # other's mean. Its own half is encoded while the other's is on its way.
        ("butterfly", (1 + 4 + 1) / 2),
        ("gather", 1 + 2 + 1),  # encodes its own vector, decodes two, merges them
    ],
)
def test_a_round_takes_as_long_as_its_coding_besides(all_reduce: str, vectors: float) -> None:
    numel, bps = 1 << 18, 6.4e8
    rule = {"name": "diloco", "period": 5, "codec": "int8", "all_reduce": all_reduce}
    task = {"name": "quadratic", "dimension": numel}
    at_once, coded = (
        simulate(make_run(rule, workers=2, steps=5, task=task, fleet=fleet), timing_only=True).seconds
        for fleet in ({}, {"coding_bps": bps})
    )
    assert coded - at_once == pytest.approx(vectors * 32 * numel / bps, rel=1e-6)


class Burst(SyncRule):
    """Workers 0 and 1 send a frame of 1 MB each to worker 2 at once; then both stay until 2 has heard of them."""

    async def run(self, peer: Peer) -> None:
        tag = Tag("burst", 1)
        if peer.id < 2:
            header = len(pack_header(Header(peer.id, 0, tag, "raw", 0, 10**6)))
            await peer.send(2, tag, Packet("raw", 0, 10**6 - header, None))
            return
        for source in (1, 0):
            try:
                await peer.recv(source, tag)
                outcome = "came"
            except PeerGone:
                outcome = "gone"
            peer.ended_round(f"from {source}", 1, outcome, [source])


def test_crash_in_mid_transfer_frees_the_link_and_is_journalled() -> None:
    # Alone a frame takes 1 s at 8 Mbit/s. Two share the downlink: half of each is there after 1 s, when 0 crashes and
    # its flow with it. The other half of 1's comes at full speed, and 0's death is known 0.25 s after the crash.
    fleet = {"up_bps": 8e6, "down_bps": 8e6, "detection_s": 0.75, "events": [{"at_s": 1.0, "worker": 0}]}
    outcome = simulate(make_run(Burst(), workers=3, fleet=fleet), timing_only=True)
    came, gone = rounds(outcome)
    assert (came.channel, came.outcome) == ("from 1", "came")
    assert came.time_s == pytest.approx(1.5 + LATENCY_S, rel=1e-12)
    assert (gone.channel, gone.outcome, gone.time_s) == ("from 0", "gone", 1.75)
    crashed, sender, receiver = outcome.left()
    assert (crashed.reason, crashed.time_s, crashed.step) == ("crashed", 1.0, 0)
    assert (sender.reason, receiver.reason) == ("finished", "finished")
    assert (crashed.sent_bytes, sender.sent_bytes, receiver.received_bytes) == (10**6, 10**6, 10**6)
    assert crashed.seconds == {"compute": 0.0, "talk": 1.0, "wait": 0.0, "evaluate": 0.0}


@pytest.mark.parametrize("timing_only", [False, True])
def test_survivors_of_a_crash_reduce_again_and_say_with_whom(timing_only: bool) -> None:
    # Rounds begin every 5 steps. A vector of 400 kB takes a butterfly of four 0.6 s at 8 Mbit/s: 1 dies in the first.
    fleet = {"up_bps": 8e6, "down_bps": 8e6, "detection_s": 1.0, "events": [{"at_s": 0.4, "worker": 1}]}
    task = {"name": "quadratic", "dimension": 100_000, "noise": 0.1}
    outcome = simulate(make_run("diloco", steps=15, task=task, fleet=fleet), timing_only=timing_only)
    told = [(record.round, record.outcome, record.members) for record in rounds(outcome)]
    survivors = (0, 2, 3)
    assert told == [
        *[(1, "degraded", survivors)] * 3,
        *[(2, "committed", survivors)] * 3,
        *[(3, "committed", survivors)] * 3,
    ]
    assert [left.reason for left in outcome.left()] == ["finished", "crashed", "finished", "finished"]
    assert [left.step for left in outcome.left()] == [15, 5, 15, 15]
    assert sorted(outcome.params) == ([] if timing_only else [*survivors])
    assert all(outcome.params[worker].equal(outcome.params[0]) for worker in outcome.params)


@pytest.mark.parametrize("rule", RULES)
def test_survivors_of_a_crash_finish_under_every_rule(rule: str) -> None:
    outcome = simulate(make_run(rule, fleet=CRASH, patience_s=5.0), timing_only=True)
    assert [left.reason for left in outcome.left()] == ["finished", "crashed", "finished", "finished"]
    assert [left.step for left in outcome.left() if left.worker != 1] == [20] * 3


# What adds up.


@pytest.mark.parametrize("fleet", [{}, {**UNEVEN, **CRASH}])
@pytest.mark.parametrize("rule", RULES)
def test_seconds_of_a_worker_add_up_to_its_lifetime(rule: str, fleet: dict[str, Any]) -> None:
    outcome = simulate(make_run(rule, fleet=fleet, patience_s=5.0))
    joined = {record.worker: record.time_s for record in outcome.records if isinstance(record, Joined)}
    assert sorted(joined) == [left.worker for left in outcome.left()] == [0, 1, 2, 3]
    for left in outcome.left():
        assert math.fsum(left.seconds.values()) == pytest.approx(left.time_s - joined[left.worker], rel=1e-9)
        assert left.seconds["compute"] > 0


@pytest.mark.parametrize("rule", RULES)
def test_bytes_sent_are_bytes_received_in_a_quiet_run(rule: str) -> None:
    left = simulate(make_run(rule, fleet={"workers": [{"count": 4}]}), timing_only=True).left()
    assert sum(record.sent_bytes for record in left) == sum(record.received_bytes for record in left) > 0


@pytest.mark.parametrize("text", ["", "x", "a" * 31, "a" * 32, "b" * 255, "b" * 256, "grüße"])
def test_frames_have_the_size_of_the_header_that_the_wire_would_carry(text: str) -> None:
    for worker in (0, 127, 128, 255, 256, 65_535, 65_536, 2**32):
        for number in (0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**36):
            tag, packet = Tag(text, number, text[::-1]), Packet(text, number, number, None)
            header = pack_header(Header(worker, 0, tag, packet.codec, packet.numel, packet.nbytes))
            assert HeaderSizes().size(worker, tag, packet) == len(header), (worker, number)


class Once(SyncRule):
    """Worker 0 sends one packet to worker 1."""

    async def run(self, peer: Peer) -> None:
        if peer.id == 0:
            await peer.send(1, Tag("once", 7, "part"), signal("hello"))
        else:
            await peer.recv(0, Tag("once", 7, "part"))


def test_bytes_of_a_packet_are_its_header_and_payload() -> None:
    sender, receiver = simulate(make_run(Once(), workers=2), timing_only=True).left()
    header = pack_header(Header(0, 0, Tag("once", 7, "part"), "signal", 0, 5))
    assert sender.sent_bytes == receiver.received_bytes == len(header) + 5
    assert (sender.received_bytes, receiver.sent_bytes) == (0, 0)


# Jitter.


class Alone(SyncRule):
    """Every worker trains on its own, 25 steps at a time."""

    async def run(self, peer: Peer) -> None:
        while await peer.train(25):
            pass


def test_jitter_keeps_the_mean_and_is_drawn_for_every_step() -> None:
    # Log-normal factors of mean 1 have variance exp(sigma^2) - 1; the mean of 25 of them has a 25th of it.
    sigma = 0.5
    run = make_run(Alone(), workers=100, steps=25 * 40, fleet={"jitter": sigma})
    records = simulate(run, timing_only=True).records
    factors = [record.seconds / (25 * STEP_S) for record in records if isinstance(record, Trained)]
    variance = (math.exp(sigma**2) - 1) / 25
    assert statistics.fmean(factors) == pytest.approx(1.0, abs=4 * math.sqrt(variance / len(factors)))
    assert statistics.variance(factors) == pytest.approx(variance, rel=0.1)


def test_jitter_of_a_worker_does_not_depend_on_the_others() -> None:
    def phases(workers: int) -> list[float]:
        run = make_run(Alone(), workers=workers, steps=100, fleet={"jitter": 0.5})
        trained = [record for record in simulate(run, timing_only=True).records if isinstance(record, Trained)]
        return [record.seconds for record in trained if record.worker == 1]

    assert phases(2) == phases(7)


# What a simulation leaves behind.


def garbage_of(run: Run) -> int:
    """Return how many objects of a simulation only the cycle collector can free, besides the records."""
    gc.collect()
    gc.disable()
    try:
        outcome = simulate(run, timing_only=True)
        found = gc.collect()
        assert outcome.records
        return found
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", ["noloco", "diloco"])
def test_rounds_leave_no_garbage_cycles(rule: str) -> None:
    # Python may look for cycles rarely during a simulation because each round frees what it made at once.
    few, many = (make_run(rule, steps=steps) for steps in (20, 220))
    simulate(few, timing_only=True)  # first: imports and caches
    assert garbage_of(many) - garbage_of(few) < 40 * 4  # 40 rounds more of 4 workers: not one object a worker-round


@pytest.mark.parametrize("threshold", [(700, 10, 10), (0, 10, 10), (10**6, 5, 5)])
def test_collector_is_as_it_was(threshold: tuple[int, int, int]) -> None:
    before = gc.get_threshold()
    during: list[tuple[int, int, int]] = []
    try:
        gc.set_threshold(*threshold)
        simulate(make_run("noloco"), timing_only=True, on_record=lambda record: during.append(gc.get_threshold()))
        assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)
    assert (during[0][0] == 0) == (threshold[0] == 0)


def test_every_worker_has_one_last_record() -> None:
    outcome = simulate(make_run("gossip", fleet={**UNEVEN, **CRASH}), timing_only=True)
    last = {record.worker: record for record in outcome.records}
    assert all(isinstance(record, Left) for record in last.values())
    assert sum(isinstance(record, Left) for record in outcome.records) == len(last) == 4


def test_groups_of_a_round_are_the_same_for_all_workers() -> None:
    ended = rounds(simulate(make_run("gossip", workers=6), timing_only=True))
    assert {record.outcome for record in ended} == {"committed"}
    for record in ended:
        same_round = [other for other in ended if other.round == record.round and other.worker in record.members]
        assert [other.members for other in same_round] == [record.members] * RandomGroups().size


# Lines that weaken, and a coordinator that is away.


def synced_at(outcome: Outcome, worker: int = 0) -> list[float]:
    return [record.time_s for record in outcome.records if isinstance(record, Synced) and record.worker == worker]


def test_a_weakened_line_is_slower_until_it_is_mended() -> None:
    def rounds(*events: dict[str, Any]) -> list[float]:
        fleet = {"step_time_s": 0.1, "up_bps": 1e5, "down_bps": 1e5, "latency_s": 0.0, "events": list(events)}
        return synced_at(simulate(make_run("diloco", fleet=fleet), timing_only=True))

    quiet, weak = rounds(), rounds({"at_s": 0.0, "kind": "link", "worker": 1, "factor": 0.5})
    compute_s = 0.5
    assert weak[0] - compute_s == pytest.approx(2 * (quiet[0] - compute_s), rel=1e-9)
    twice = rounds(
        {"at_s": 0.0, "kind": "link", "worker": 1, "factor": 0.5},
        {"at_s": 0.0, "kind": "link", "worker": 1, "factor": 0.5, "until_s": quiet[0] + 100},
    )
    assert twice[0] - compute_s == pytest.approx(4 * (quiet[0] - compute_s), rel=1e-9)
    mended = rounds({"at_s": 0.0, "kind": "link", "worker": 1, "factor": 0.5, "until_s": weak[0]})
    assert mended[0] == weak[0]
    assert mended[1] - mended[0] == pytest.approx(quiet[1] - quiet[0], rel=1e-9)


def test_while_the_coordinator_is_away_workers_train_and_rounds_wait() -> None:
    quiet = simulate(make_run("diloco"), timing_only=True)
    first = synced_at(quiet)[0]
    away = {"at_s": first - 0.1, "kind": "coordinator", "until_s": first + 3.0}
    outcome = simulate(make_run("diloco", fleet={"events": [away]}), timing_only=True)
    assert synced_at(outcome)[0] == pytest.approx(first + 3.0, abs=0.05)
    assert [r.outcome for r in outcome.records if isinstance(r, Synced)] == [
        r.outcome for r in quiet.records if isinstance(r, Synced)
    ]
    assert len(synced_at(outcome)) == len(synced_at(quiet))


def test_a_death_is_not_heard_of_while_the_coordinator_is_away() -> None:
    events = [{"at_s": 0.0, "kind": "coordinator", "until_s": 9.0}, {"at_s": 0.1, "kind": "crash", "worker": 1}]
    outcome = simulate(make_run("diloco", fleet={"events": events, "detection_s": 0.5}), timing_only=True)
    assert min(synced_at(outcome)) > 9.0
    assert outcome.left()[1].reason == "crashed"


def test_a_machine_given_notice_that_is_gone_before_is_not_taken_away_twice() -> None:
    events = [
        {"at_s": 0.2, "kind": "preempt", "worker": 1, "notice_s": 1.0},
        {"at_s": 0.21, "kind": "crash", "worker": 1},
        {"at_s": 0.6, "kind": "join", "worker": 1},
    ]
    outcome = simulate(make_run("diloco", fleet={"events": events}), timing_only=True)
    assert [left.reason for left in outcome.left() if left.worker == 1] == ["crashed", "finished"]


def test_a_machine_given_notice_leaves_between_two_rounds() -> None:
    events = [{"at_s": 0.2, "kind": "preempt", "worker": 1, "notice_s": 30.0}]
    outcome = simulate(make_run("diloco", fleet={"events": events}), timing_only=True)
    mine = [record for record in outcome.records if record.worker == 1]
    assert isinstance(mine[-1], Left)
    assert mine[-1].reason == "preempted"
    assert isinstance(mine[-2], Synced)  # the round it had trained for
