"""Traces of real machines: how files are read, how they are refused, and how a fleet plays them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decentral.config import validated
from decentral.errors import ConfigError
from decentral.fleet import Event, Fleet, WorkerGroup
from decentral.fleet.replay import Trace
from decentral.fleet.traces import TRACES, Change, read_trace

NODES = "0,add,a\n0,add,b\n60000,remove,a\n90000,add,c\n120000,remove,b\n120000,remove,c\n"
COUNTS = "2021-12-11, 11:11:30, 3\n2021-12-11, 11:13:10, 1\n2021-12-11, 11:14:50, 2\n"


def written(folder: Path, text: str) -> str:
    path = folder / "trace"
    path.write_text(text, encoding="utf-8")
    return str(path)


def played(trace: Trace, workers: int, seed: int = 0) -> list[tuple[float, str, int | None]]:
    return [(event.at_s, event.kind, event.worker) for event in trace.events([None] * workers, seed)]


def test_changes_by_node(tmp_path: Path) -> None:
    changes = read_trace(written(tmp_path, NODES))
    assert changes[:3] == (Change(0, True, "a"), Change(0, True, "b"), Change(60, False, "a"))
    assert changes[-1] == Change(120, False, "c")


def test_changes_by_count(tmp_path: Path) -> None:
    expected = [(0.0, True)] * 3 + [(100.0, False)] * 2 + [(200.0, True)]
    assert [(change.at_s, change.came) for change in read_trace(written(tmp_path, COUNTS))] == expected


def test_skypilots_json_counts_at_every_tick(tmp_path: Path) -> None:
    text = json.dumps({"metadata": {"gap_seconds": 300}, "data": [0, 4, 4, 1]})
    expected = [(300.0, True)] * 4 + [(900.0, False)] * 3
    assert [(change.at_s, change.came) for change in read_trace(written(tmp_path, text))] == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": the trace is empty"),
        ("0,add,a\n\n5,add,b\n", ":2: expected milliseconds,add,node"),
        ("0,add,a\n5,grow,b\n", ":2: expected milliseconds,add,node or milliseconds,remove,node, got '5,grow,b'"),
        ("0,add,a\nx,add,b\n", ":2: expected a time in milliseconds, got 'x'"),
        ("-5,add,a\n", ":1: a time in milliseconds must be 0 or more, got '-5'"),
        ("inf,add,a\n", ":1: a time in milliseconds must be 0 or more"),
        ("9000,add,a\n5000,add,b\n", ":2: out of order: 5 s after the beginning, but the line before is at 9 s"),
        ("0,add,a\n5,remove,b\n", ":2: b is removed but not there"),
        ("0,add,a\n5,add,a\n", ":2: a is added but there already"),
        ("2021-12-11, 11:11:30, 3\n2021-12-11, 11:10:30, 2\n", ":2: out of order"),
        ("2021-12-11, 11:11:30, -3\n", ":1: -3 machines; a count must be 0 to 100000"),
        ("2021-12-11, 11:11:30, 3.5\n", ":1: expected a number of machines, got '3.5'"),
        ("2021-12-11, 11:11:30,\n", ":1: a gap: the count is missing"),
        ("2021-12-11, 11:11, 3\n", ":1: expected a date and a time"),
        ("2021-12-11, 11:11:30, 3\n2021-12-11, 18:11:30, 3\n", ":2: a gap: no sample for 7.0 h, at most 6 h"),
        ("hello\n", ":1: expected date, time, count"),
        ("{", ":1: not valid JSON"),
        ("{}", ': expected {"metadata"'),
        ('{"metadata": {"gap_seconds": 0}, "data": [1]}', ": metadata.gap_seconds: 0"),
        ('{"metadata": {"gap_seconds": 300}, "data": []}', ": data: expected a list of counts"),
        ('{"metadata": {"gap_seconds": 300}, "data": [4, null]}', ": data[1]: a gap: the count is missing"),
        ('{"metadata": {"gap_seconds": 300}, "data": [4, 1000000]}', ": data[1]: 1000000 machines"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    source = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(source)
    assert str(caught.value).startswith(source + words)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot read the trace: No such file.*bamboo:p3"):
        read_trace("nowhere.csv")


# How a fleet plays a trace.


def test_a_machine_is_played_by_the_lowest_free_worker(tmp_path: Path) -> None:
    trace = Trace(source=written(tmp_path, NODES))
    expected = [(60.0, "preempt", 0), (90.0, "join", 0), (120.0, "preempt", 1), (120.0, "preempt", 0)]
    assert played(trace, 2) == expected
    assert trace.starters([None] * 2) == {0, 1}


def test_a_machine_without_a_worker_is_left_out_for_its_whole_life(tmp_path: Path) -> None:
    assert played(Trace(source=written(tmp_path, NODES)), 1) == [
        (60.0, "preempt", 0),
        (90.0, "join", 0),
        (120.0, "preempt", 0),
    ]


def test_a_run_may_begin_in_the_middle_go_faster_and_stop(tmp_path: Path) -> None:
    trace = Trace(source=written(tmp_path, NODES), begin_s=70, speed_up=10, duration_s=30)
    assert played(trace, 2) == [(2.0, "join", 1)]  # b alone is there at 70 s; 120 s lies beyond
    assert trace.starters([None] * 2) == {0}


def test_notice_is_given_before_the_end_but_not_before_the_machine_comes(tmp_path: Path) -> None:
    events = list(Trace(source=written(tmp_path, NODES), notice_s=45).events([None] * 2, 0))
    told = {(event.worker, event.gone_at_s): event.at_s for event in events if event.kind == "preempt"}
    assert told == {(0, 60.0): 15.0, (1, 120.0): 75.0, (0, 120.0): 90.0}


def test_where_only_counts_are_known_the_seed_says_who_goes(tmp_path: Path) -> None:
    trace = Trace(source=written(tmp_path, COUNTS))
    gone = {
        tuple(sorted(name[2] or 0 for name in played(trace, 3, seed) if name[1] == "preempt")) for seed in range(30)
    }
    assert gone == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize(
    ("source", "workers", "begin_s", "losses"),
    [("bamboo:p3", 32, 0, 167), ("bamboo:g4dn", 24, 600, 74), ("bamboo:a100", 64, 0, None)],
)
def test_a_whole_fleet_is_there_as_the_trace_says(
    source: str, workers: int, begin_s: float, losses: int | None
) -> None:
    trace = Trace(source=source, begin_s=begin_s)
    trace.check([None] * workers)
    there = set(trace.starters([None] * workers))
    changes = read_trace(source)
    events = list(trace.events([None] * workers, 0))
    assert losses is None or sum(event.kind == "preempt" for event in events) == losses
    for at_s in sorted({event.at_s for event in events}):
        for event in [event for event in events if event.at_s == at_s]:
            assert (event.worker in there) == (event.kind == "preempt")
            there ^= {event.worker}
        expected = sum(1 if change.came else -1 for change in changes if change.at_s - begin_s <= at_s)
        assert len(there) == expected


@pytest.mark.parametrize(
    ("trace", "workers", "words"),
    [
        (Trace(source="bamboo:p4"), 4, "fleet.churn.source: no trace 'bamboo:p4'; did you mean 'bamboo:p3'?"),
        (Trace(source="bamboo:p3"), 40, "bamboo:p3 has at most 32 machines at a time, and the fleet 40 workers"),
        (Trace(source="bamboo:g4dn"), 4, "no machine is there 0 s into bamboo:g4dn; the next one comes at 480 s"),
        (Trace(source="bamboo:p3", begin_s=1e6), 4, "fleet.churn.begin_s: 1e+06, but bamboo:p3 ends after 40920 s"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(trace: Trace, workers: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Fleet(workers=(WorkerGroup(count=workers),), churn=trace).check()
    assert words in str(caught.value)


def test_the_name_of_a_built_in_trace_is_short_for_a_table() -> None:
    short, long = (
        Fleet.model_validate({"churn": churn}).churn
        for churn in ("bamboo:p3", {"name": "trace", "source": "bamboo:p3"})
    )
    assert short == long == Trace(source="bamboo:p3")


def test_an_unknown_model_of_churn_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown model of churn 'weibull'; choose one of exponential, preemption"):
        validated({"fleet": {"churn": "weibull"}}, "run")


def test_the_licence_of_the_traces_stands_beside_them() -> None:
    import decentral.fleet

    data = Path(decentral.fleet.__path__[0]) / "data"
    assert "UCLASystem" in (data / "LICENSE-bamboo").read_text(encoding="utf-8")
    assert all((data / name).is_file() for name in TRACES.values())
    assert isinstance(next(Trace(source="bamboo:p3").events([None] * 4, 0)), Event)
