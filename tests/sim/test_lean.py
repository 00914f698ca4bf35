"""Runs whose rounds are exchanges, without messages: what they come to is what messages come to."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
from lean_runs import by_messages, check_equal, draw_fleet, lean, make_run
from scene import Scene

from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.journal import Synced, Trained
from decentral.peer import Peer
from decentral.protocols import Gossip
from decentral.sim.lean.agenda import Agenda
from decentral.sim.lean.lines import Flow, Lines
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch
from decentral.wire import Header, Tag, pack_header

RULES = (
    {"name": "noloco", "period": 5},
    {"name": "noloco", "period": 5, "group": 3, "codec": "int8"},
    {"name": "gossip", "period": 3, "topology": "ring", "clip": 0.5},
    {"name": "gossip", "period": 3, "topology": "exponential"},
    {"name": "gossip", "period": 3, "topology": {"name": "exponential", "one_peer": True}},
    {"name": "gossip", "period": {"name": "growing", "base": 2, "horizon": 5}, "topology": "all"},
)


@pytest.mark.parametrize("seed", range(24))
def test_every_record_is_the_one_of_messages(seed: int) -> None:
    rng = random.Random(seed)
    task = {"name": "quadratic", "dimension": rng.choice([16, 4096, 200_000])}
    run = make_run(RULES[seed % len(RULES)], seed=seed, task=task, fleet=draw_fleet(rng), patience_s=1e4)
    check_equal(lean(run), by_messages(run))


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_headers_take_their_share_and_nobody_codes_aside(codec: str) -> None:
    rule = {"name": "noloco", "period": 5, "codec": codec}
    fleet = {"workers": [{"count": 4}], "coding_bps": 1e6, "network": {"overhead": 0.25}}
    run = make_run(rule, task={"name": "quadratic", "dimension": 200_000}, fleet=fleet)
    check_equal(lean(run), by_messages(run))
    alike = {"workers": [{"count": 4, "up_bps": 75e6, "down_bps": 75e6}]}
    assert lean(run).seconds == lean(run.model_copy(update={"fleet": Fleet(**alike)})).seconds


@pytest.mark.parametrize(("workers", "rounds"), [(300, 2), (3, 140)])
def test_numbers_of_all_lengths_are_counted_in_headers(workers: int, rounds: int) -> None:
    run = make_run({"name": "noloco", "period": 1}, steps=rounds, fleet={"workers": [{"count": workers}]})
    check_equal(lean(run), by_messages(run))


def test_a_pair_in_step_takes_two_messages_each_one_latency_long() -> None:
    fleet = {"workers": [{"count": 2}], "step_time_s": 0.1, "up_bps": 1e6, "down_bps": 2e6, "latency_s": 0.25}
    run = make_run({"name": "gossip", "period": 10}, steps=10, fleet=fleet)
    sizes = {"x": 4 * 4096, "v": 2}
    header = {
        part: len(pack_header(Header(0, 0, Tag("pair", 1, part), codec, numel, sizes[part])))
        for part, codec, numel in (("x", "float32", 4096), ("v", "signal", 0))
    }
    seconds = [8 * (sizes[part] + header[part]) / 1e6 + 0.25 for part in ("x", "v")]
    ended = [record.time_s for record in lean(run).records if isinstance(record, Synced)]
    assert ended == [pytest.approx(1.0 + sum(seconds), rel=1e-12)] * 2


@pytest.mark.parametrize("seed", range(20))
def test_flows_arrive_when_those_of_the_network_do(seed: int) -> None:
    rng = random.Random(seed)
    nodes = rng.randint(2, 6)
    up, down = ([rng.choice([1.0, 2.0, 5.0]) for _ in range(nodes)] for _ in range(2))
    caps = rng.choice([None, lambda src, dst: 1.5e6 if src < dst else 1e9])
    scene = Scene(up, down, latency_s=0.1, pair_bps=caps)
    agenda, arrived = Agenda(), {}
    lines = Lines(
        agenda,
        [each * 1e6 for each in up],
        [each * 1e6 for each in down],
        lambda src, dst: 0.1,
        caps,
        lambda flow: arrived.setdefault(flow.round, agenda.now),
    )
    for number in range(60):
        src, dst = rng.sample(range(nodes), 2)
        nbytes, when = rng.randint(1, 400_000), rng.choice([round(rng.uniform(0, 30)), rng.uniform(0, 30)])
        scene.send(src, dst, nbytes / 125_000, when)
        agenda.add(when, lines.send, Flow(src, dst, nbytes, number, False))
    agenda.run()
    scene.run()
    expected = sorted(flow.arrived_at for flow in scene.flows)
    assert sorted(arrived.values()) == pytest.approx(expected, rel=1e-12)
    scene.loop.close()


def test_records_stand_in_the_order_of_time_and_can_be_gone_through_again() -> None:
    told: list[object] = []
    run = make_run(RULES[0], fleet={"workers": [{"count": 5}], "jitter": 0.2})
    outcome = simulate(run, timing_only=True, on_record=told.append)
    times = [record.time_s for record in outcome.records]
    assert times == sorted(times)
    assert list(outcome.records) == told
    outcome.verify()
    assert outcome.samples() == 5 * run.steps * run.batch_size
    assert outcome.totals.rounds == {"committed": 5 * 6}
    assert [left.worker for left in outcome.left()] == list(range(5))


def test_no_record_is_kept() -> None:
    def kept(rounds: int) -> int:
        run = make_run({"name": "gossip", "period": 1, "topology": "ring"}, steps=rounds)
        before = len(gc.get_objects())
        outcome = lean(run)
        assert outcome.samples() == 4 * rounds * run.batch_size
        return len(gc.get_objects()) - before

    kept(2)  # imports and caches
    assert kept(300) - kept(100) < 200  # 1,600 records more


class Patient(Gossip):
    """Gossip that does something else besides, and only inherits what Gossip says of its rounds."""

    async def run(self, peer: Peer) -> None:
        await peer.train(1)
        await super().run(peer)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ({"name": "diloco", "weighted": True}, {}),
        ({"name": "diloco", "all_reduce": "ring"}, {}),
        ({"name": "diloco", "codec": {"name": "error_feedback", "codec": "int8"}}, {}),
        ({"name": "local_sgd", "switch_step": 3}, {}),
        ({"name": "diloco", "period": 10}, {"patience_s": 0.05}),
        ({"name": "diloco"}, {"fleet": {"network": {"links": [{"jitter_s": 0.01}]}}}),
        (Patient(), {}),
        ({"name": "noloco", "gamma": 0.5}, {}),
        ({"name": "gossip", "period": {"name": "timed", "seconds": 0.2}}, {}),
        ("gossip", {"leases": True}),
        ("gossip", {"fleet": {"events": [{"at_s": 0.1, "kind": "crash", "worker": 1}]}}),
        ("gossip", {"fleet": {"workers": [{"count": 3}, {"start_s": 0.5}]}}),
        ("gossip", {"fleet": {"network": {"window_bytes": 65536}}}),
        ("gossip", {"fleet": {"network": {"links": [{"loss": 0.01}]}}}),
        ("gossip", {"fleet": {"network": {"partitions": [{"from_s": 0.1, "until_s": 0.2, "side": [0]}]}}}),
        ({"name": "noloco", "period": 10}, {"patience_s": 0.3}),
    ],
)
def test_what_is_more_than_exchanges_among_workers_who_stay_takes_messages(
    rule: object, fields: dict[str, Any]
) -> None:
    outcome = simulate(make_run(rule, **fields), timing_only=True)
    assert isinstance(outcome.records, list)
    assert any(isinstance(record, Trained) for record in outcome.records)


def test_a_model_that_does_not_fit_is_refused_in_the_same_words() -> None:
    groups = [{"count": 2, "device": "A100-80", "step_time_s": 0.1}]
    task = {"name": "layer_stack", "layers": 4, "parameters": 6e9}
    run = make_run("noloco", task=task, fleet={"workers": groups})  # parameters, gradients and the rule's two
    messages = []
    for watch in (Watch(), Watch(links=True)):
        with pytest.raises(ConfigError, match="needs 89\\.4 GiB") as caught:
            simulate(run, timing_only=True, watch=watch)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
