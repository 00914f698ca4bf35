"""Runs whose rounds are butterfly all-reduces, without messages: what they come to is what messages come to."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from lean_runs import by_messages, check_equal, draw_fleet, lean, make_run
from scene import check_max_min, draw_instance

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Synced
from decentral.protocols import collectives
from decentral.sim.lean import bulk
from decentral.sim.lean.burst import Burst
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch
from decentral.wire import Header, Tag, pack_header

TOLERANCE = 1e-9
"""Seconds: a round is worked out from its own beginning, and messages add up the times of the whole run."""

RULES = (
    {"name": "diloco", "period": 5},
    {"name": "local_sgd", "period": 4, "codec": "int8"},
    {"name": "slowmo", "period": {"name": "growing", "base": 2, "horizon": 5}, "codec": "bf16"},
    {"name": "ddp"},
    {"name": "ddp", "buckets": {"name": "buckets", "megabytes": 0.05}},
)
TASKS: tuple[dict[str, Any], ...] = (
    *({"name": "quadratic", "dimension": dimension} for dimension in (3, 4096, 200_000)),
    {"name": "layer_stack", "layers": 4, "parameters": 4e4},
)


def draw_run(rng: random.Random, rule: object, seed: int) -> Run:
    fleet: dict[str, Any] = draw_fleet(rng)
    fleet["network"] = {"links": [rng.choice([{}, {"bps": 5e6}, {"latency_s": 0.3}])]}
    return make_run(rule, seed=seed, task=rng.choice(TASKS), fleet=fleet, patience_s=1e4)


@pytest.mark.parametrize("seed", range(40))
def test_every_record_is_the_one_of_messages(seed: int) -> None:
    run = draw_run(random.Random(seed), RULES[seed % len(RULES)], seed)
    check_equal(lean(run), by_messages(run), TOLERANCE)


@pytest.mark.parametrize("seed", range(10))
def test_long_vectors_go_in_segments(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(collectives, "SEGMENT", 700)
    monkeypatch.setattr(collectives, "MAX_SEGMENTS", rng.choice([2, 6, 9]))
    rule = {"name": "ddp"} if seed % 2 else {"name": "diloco", "period": 15}
    fleet = draw_fleet(rng) | {"network": {"links": [{}]}}
    task = {"name": "quadratic", "dimension": rng.choice([1000, 20_000])}
    run = make_run(rule, seed=seed, steps=4 if seed % 2 else 30, task=task, fleet=fleet, patience_s=1e4)
    check_equal(lean(run), by_messages(run), TOLERANCE)


@pytest.mark.parametrize(("workers", "rounds"), [(130, 1), (2, 140), (1, 3)])
def test_numbers_of_all_lengths_are_counted_in_headers(workers: int, rounds: int) -> None:
    fleet = {"workers": [{"count": workers}]}
    run = make_run({"name": "diloco", "period": 1}, steps=rounds, fleet=fleet, patience_s=1e4)
    check_equal(lean(run), by_messages(run), TOLERANCE)


def test_headers_take_their_share_of_lines_with_messages_and_without() -> None:
    fleet = {"workers": [{"count": 3}, {"up_bps": 2e6}], "network": {"overhead": 0.0436, "links": [{"bps": 5e6}]}}
    run = make_run({"name": "diloco", "period": 5, "codec": "int8"}, fleet=fleet)
    check_equal(lean(run), by_messages(run), TOLERANCE)


@pytest.mark.parametrize("where", ["fleet", "group"])
def test_where_coding_takes_time_all_reduces_take_messages(where: str) -> None:
    fleet: dict[str, Any] = {"workers": [{"count": 3}, {}]}
    (fleet if where == "fleet" else fleet["workers"][1])["coding_bps"] = 1e8
    run = make_run({"name": "diloco", "period": 5, "codec": "int8"}, task=TASKS[2], fleet=fleet)
    assert isinstance(simulate(run, timing_only=True).records, list)


def test_a_round_in_step_is_two_messages_to_everybody_and_a_vote() -> None:
    fleet = {"workers": [{"count": 4}], "step_time_s": 0.1, "up_bps": 1e6, "down_bps": 2e6, "latency_s": 0.25}
    run = make_run({"name": "diloco", "period": 10}, steps=20, fleet=fleet)
    header = {
        part: len(pack_header(Header(0, 0, Tag("sync", 1, f"0.0.{part}"), "float32", 1024, 4096))) for part in "sg"
    }
    round_s = 1.0 + sum(3 * 8 * (4096 + header[part]) / 1e6 + 0.25 for part in "sg") + 2 * 0.25
    ended = [record.time_s for record in lean(run).records if isinstance(record, Synced)]
    assert ended == [pytest.approx(round_s, rel=1e-12)] * 4 + [pytest.approx(2 * round_s, rel=1e-12)] * 4


def test_rounds_that_are_alike_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bursts = []
    play = Burst.run
    monkeypatch.setattr(Burst, "run", lambda burst: bursts.append(play(burst)))
    lean(make_run({"name": "diloco", "period": 1}, steps=300))
    assert len(bursts) == 3  # of round numbers of one, two and three bytes


@pytest.mark.parametrize("seed", range(200))
def test_rates_are_max_min_fair(seed: int) -> None:
    flows, capacity = draw_instance(random.Random(seed))
    flows = [(path * 3)[:3] for path in flows if path]  # as many resources on every path, some of them twice
    flows = [path for path in flows if len(set(path)) == 3]
    names = sorted(capacity)
    paths = [np.array([names.index(path[place]) for path in flows], np.int64) for place in range(3)]
    rates = bulk.fill(paths, np.array([capacity[name] for name in names]))
    check_max_min(flows, capacity, rates.tolist())


def test_a_model_that_does_not_fit_is_refused_in_the_same_words() -> None:
    groups = [{"count": 2, "device": "A100-80", "step_time_s": 0.1}]
    task = {"name": "layer_stack", "layers": 4, "parameters": 6e9}
    for rule in ("diloco", "slowmo"):
        run = make_run(rule, task=task, fleet={"workers": groups})
        messages = []
        for watch in (Watch(), Watch(links=True)):
            with pytest.raises(ConfigError, match="needs") as caught:
                simulate(run, timing_only=True, watch=watch)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
