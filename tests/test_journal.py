"""The journal: every record survives the file, and a torn last line is no loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import cluster, crash

from decentral.errors import ConfigError
from decentral.journal import (
    KINDS,
    Counterfactual,
    Evaluated,
    Joined,
    JournalWriter,
    Leased,
    Left,
    Lost,
    Metered,
    Rebuilt,
    Record,
    Refused,
    Restored,
    Settled,
    Sketched,
    Spent,
    Synced,
    Trained,
    read_journal,
    record_from,
)
from decentral.protocols import DiLoCo
from decentral.sim.simulate import simulate

RECORDS: list[Record] = [
    Joined(time_s=0.0, worker=2, parameters=17),
    Trained(time_s=0.1 + 0.2, worker=2, step=5, steps=5, samples=40, seconds=1e-17, loss=0.123456789012345),
    Trained(time_s=2, worker=0, step=5, steps=5, samples=40, seconds=1e300, loss=None),
    Leased(time_s=2.0, worker=0, start=0, stop=2**40),
    Settled(time_s=2.0, worker=0, samples=40),
    Lost(time_s=2.0, worker=0, samples=8),
    Synced(time_s=2.5, worker=1, channel='a "b"\\\n7 äö', round=3, outcome="degraded", members=(0, 1), sent_bytes=9),
    Synced(time_s=2.5, worker=1, channel="sync", round=3, outcome="skipped", members=(), sent_bytes=2**60),
    Refused(time_s=2.5, worker=1, source=3, code="not_finite", count=2),
    Rebuilt(time_s=2.6, worker=1, stage=1, members=(0, 2)),
    Restored(time_s=2.6, worker=1, generation=4, reason=""),
    Restored(time_s=2.6, worker=1, generation=None, reason="[2] are gone too"),
    Evaluated(time_s=3.0, worker=0, step=5, metrics={"loss": 1.5, 'odd "name"': -2.0}),
    Counterfactual(time_s=3.0, worker=0, step=5, members=(0, 2), metrics={"loss": 1.25}),
    Sketched(time_s=3.0, worker=0, number=2, sketch="AACAPwAAAEA="),
    Spent(time_s=3.5, worker=1, activity="talk", seconds=0.1),
    Metered(
        time_s=3.5,
        worker=1,
        seconds={"compute": 1.5},
        loading_s=0.25,
        received_bytes=7,
        sent=((0, 2**40, 0.1), (2, 1, 2.0)),
    ),
    Left(
        time_s=4.0,
        worker=1,
        reason="worker 1 has been declared dead",
        step=5,
        seconds={"compute": 1.5, "transfer": 0.0},
        sent_bytes=9,
        received_bytes=8,
        messages_sent=7,
    ),
]


def test_the_list_above_has_every_kind() -> None:
    assert {type(record) for record in RECORDS} == set(KINDS.values())


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_a_record_is_one_line_of_json(record: Record) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert json.loads(line)["kind"] == record.kind
    assert record_from(json.loads(line)) == record


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    write(tmp_path, [Evaluated(time_s=0.0, worker=0, step=1, metrics={"a": float("nan"), "b": float("-inf")})])
    (read,) = read_journal(tmp_path / "journal")
    assert isinstance(read, Evaluated)
    assert read.metrics["a"] != read.metrics["a"]
    assert read.metrics["b"] == float("-inf")


def write(folder: Path, records: list[Record]) -> Path:
    writer = JournalWriter(folder / "journal")
    writer.write(records[:2])
    writer.write(records[2:])
    writer.close()
    return folder / "journal"


def test_a_journal_survives_the_file(tmp_path: Path) -> None:
    assert list(read_journal(write(tmp_path, RECORDS))) == RECORDS


def test_what_was_written_can_be_read_before_the_writer_closes(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal")
    writer.write(RECORDS)
    assert list(read_journal(tmp_path / "journal")) == RECORDS
    writer.close()


def test_a_whole_runs_journal_survives_the_file(tmp_path: Path) -> None:
    records = simulate(cluster(DiLoCo(period=3), 3, 9, events=[crash(0.2, 1)])).records
    assert list(read_journal(write(tmp_path, records))) == records


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, RECORDS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_journal(path)) == RECORDS[:-1]


def test_an_empty_journal_has_no_records(tmp_path: Path) -> None:
    assert list(read_journal(write(tmp_path, []))) == []


@pytest.mark.parametrize(
    "line", ["", "{", "nothing", '"ab"', "3", "null", "[1, 2]", '{"kind": "joined"}', '{"kind": []}']
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal"
    path.write_text(f"{RECORDS[0].to_json()}\n{line}\n{RECORDS[1].to_json()}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"journal, line 2: not a journal record"):
        list(read_journal(path))


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown journal record 'teleported'; known: joined, trained, synced"):
        record_from({"kind": "teleported", "time_s": 0.0, "worker": 1})
    with pytest.raises(TypeError):
        record_from({"kind": "joined", "time_s": 0.0, "worker": 1, "parameters": 3, "colour": "red"})


def test_reading_a_record_does_not_change_its_fields() -> None:
    fields = json.loads(RECORDS[3].to_json())
    before = json.dumps(fields)
    record_from(fields)
    assert json.dumps(fields) == before
