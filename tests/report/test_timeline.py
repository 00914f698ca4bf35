"""Timelines obey the rules of the trace-event format, and show what the journal says.

The rules, after the Trace Event Format's document: which keys an event of each phase has, that a counter's values are
numbers, that complete events of one track nest, and that marks have a scope.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cluster import cluster, crash
from sockets import train_here

from decentral.journal import Evaluated, Record, Synced
from decentral.outcome import Outcome
from decentral.protocols import DDP, DiLoCo, StreamingDiLoCo
from decentral.report.timeline import timeline, write_timeline
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch

Event = dict[str, Any]

REQUIRED = {
    "M": {"ph", "pid", "tid", "name", "args"},
    "X": {"ph", "pid", "tid", "name", "args", "ts", "dur"},
    "i": {"ph", "pid", "tid", "name", "args", "ts", "s"},
    "C": {"ph", "pid", "tid", "name", "args", "ts"},
}
METADATA = {"process_name": str, "process_sort_index": int, "thread_name": str}


def check_format(text: str) -> list[Event]:
    """Return the events of a trace file; fails if it breaks a rule of the format."""
    trace = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    last: dict[tuple[Any, ...], float] = defaultdict(float)
    named: set[tuple[int, int]] = set()
    for event in trace["traceEvents"]:
        assert set(event) == REQUIRED[event["ph"]]
        assert type(event["pid"]) is type(event["tid"]) is int
        assert event["pid"] > 0
        if event["ph"] == "M":
            (value,) = event["args"].values()
            assert type(value) is METADATA[event["name"]]
            named.add((event["pid"], event["tid"]))
            continue
        track = (event["pid"], event["ph"], event["name"] if event["ph"] == "C" else event["tid"])
        assert event["ts"] >= last[track], "time goes back on a track, or spans of it overlap"
        last[track] = round(event["ts"] + event.get("dur", 0.0), 3)
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] == "i":
            assert event["s"] in "gpt"
        if event["ph"] == "C":
            assert all(type(value) in (int, float) and value >= 0 for value in event["args"].values())
        assert (event["pid"], event["tid"]) in named
    return list(trace["traceEvents"])


def trace_of(records: list[Record], folder: Path) -> list[Event]:
    path = folder / "trace.json"
    write_timeline(records, path)
    return check_format(path.read_text(encoding="utf-8"))


def spans(events: list[Event], worker: int, track: str) -> list[Event]:
    pid = worker + 1
    (tid,) = [
        event["tid"]
        for event in events
        if event["pid"] == pid and event["name"] == "thread_name" and event["args"]["name"] == track
    ]
    return [event for event in events if (event["ph"], event["pid"], event["tid"]) == ("X", pid, tid)]


def seconds(events: list[Event]) -> float:
    return sum(event["dur"] for event in events) / 1e6


RULES = [DDP(), DiLoCo(period=3), StreamingDiLoCo(period=4, overlap=1)]


def simulated(rule: Any, watch: Watch) -> Outcome:
    return simulate(cluster(rule, 3, 12, speeds=[1.0, 1.0, 0.5], events=[crash(0.4, 1)]), watch=watch)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("watched", [False, True])
def test_timelines_of_simulated_runs_keep_the_format(rule: Any, watched: bool, tmp_path: Path) -> None:
    trace_of(simulated(rule, Watch(spans=watched)).records, tmp_path)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_watched_timeline_has_all_that_the_accounts_have(rule: Any, tmp_path: Path) -> None:
    outcome = simulated(rule, Watch(spans=True))
    events = trace_of(outcome.records, tmp_path)
    for left in outcome.left():
        for track in ("compute", "talk"):
            assert seconds(spans(events, left.worker, track)) == pytest.approx(left.seconds[track], abs=1e-6)


def test_an_unwatched_timeline_has_the_local_phases_and_rounds(tmp_path: Path) -> None:
    outcome = simulated(DiLoCo(period=3), Watch())
    events = trace_of(outcome.records, tmp_path)
    for worker in (0, 2):
        (left,) = [left for left in outcome.left() if left.worker == worker]
        assert seconds(spans(events, worker, "compute")) == pytest.approx(left.seconds["compute"], abs=1e-6)
        ended = [record for record in outcome.records if isinstance(record, Synced) and record.worker == worker]
        drawn = spans(events, worker, f"rounds: {ended[0].channel}")
        assert [span["name"] for span in drawn] == [f"{record.round} {record.outcome}" for record in ended]
        assert [span["ts"] + span["dur"] for span in drawn] == pytest.approx([1e6 * each.time_s for each in ended])


def test_a_real_runs_journal_has_a_timeline_too(tmp_path: Path) -> None:
    outcome = train_here(cluster(DiLoCo(period=3), 2, 6))
    events = trace_of(outcome.records, tmp_path)
    assert [len(spans(events, worker, "compute")) for worker in (0, 1)] == [2, 2]


def test_marks_say_who_came_and_how_they_left() -> None:
    events = list(timeline(simulated(DiLoCo(period=3), Watch()).records))
    marks = [(event["pid"] - 1, event["name"]) for event in events if event["ph"] == "i"]
    assert [name for worker, name in marks if worker == 1] == ["joined", "crashed"]
    assert [name for worker, name in marks if worker == 2] == ["joined", "finished"]
    (crashed,) = [event for event in events if event["name"] == "crashed"]
    assert crashed["ts"] == pytest.approx(0.4e6)


def test_the_counter_of_a_worker_integrates_to_the_bytes_that_it_sent() -> None:
    outcome = simulated(DiLoCo(period=3), Watch())
    events = list(timeline(outcome.records))
    for left in outcome.left():
        counts = [event for event in events if event["ph"] == "C" and event["pid"] == left.worker + 1]
        megabits = sum(here["args"]["Mbit/s"] * (there["ts"] - here["ts"]) / 1e6 for here, there in pairwise(counts))
        assert megabits * 1e6 / 8 == pytest.approx(left.sent_bytes, rel=1e-6)
        assert counts[-1]["args"]["Mbit/s"] == 0.0


def test_what_is_no_number_does_not_break_the_file(tmp_path: Path) -> None:
    odd = Evaluated(time_s=0.0, worker=0, step=1, metrics={"loss": float("nan"), 'a "quoted" name': float("inf")})
    (mark,) = [event for event in trace_of([odd], tmp_path) if event["ph"] == "i"]
    assert mark["args"] == {"step": 1, "loss": "nan", 'a "quoted" name': "inf"}


def test_no_journal_is_an_empty_timeline(tmp_path: Path) -> None:
    assert trace_of([], tmp_path) == []
