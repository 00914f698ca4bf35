"""A run looked at by its journal: while that grows, when it is over, and when there is none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from decentral.errors import ConfigError
from decentral.journal import Joined, Left, Record, Synced, Trained
from decentral.report import status as report
from decentral.report.look import JournalLook, looking

JOINED = Joined(time_s=0.0, worker=0, parameters=1)
TRAINED = Trained(time_s=1.0, worker=0, step=5, steps=5, samples=5, seconds=1.0, loss=0.5)
SYNCED = Synced(
    time_s=2.0, worker=0, channel="sync", round=1, outcome="committed", members=(0, 1), sent_bytes=1_000_000
)
LEFT = Left(
    time_s=3.0,
    worker=0,
    reason="finished",
    step=5,
    seconds={"compute": 1.0},
    sent_bytes=1_000_000,
    received_bytes=0,
    messages_sent=1,
)


def lines(*records: Record) -> str:
    return "".join(record.to_json() + "\n" for record in records)


def test_a_growing_journal_is_read_on_from_where_it_ended(tmp_path: Path) -> None:
    with (tmp_path / "journal.jsonl").open("w", buffering=1) as journal:
        look = JournalLook(tmp_path)
        assert look()["workers"] == []
        torn = lines(TRAINED)
        journal.write(lines(JOINED) + torn[:20])
        journal.flush()
        assert [worker["step"] for worker in look()["workers"]] == [0]
        journal.write(torn[20:])
        journal.flush()
        assert [(worker["step"], worker["samples"]) for worker in look()["workers"]] == [(5, 5)]
        assert not look()["over"]


def test_a_run_that_was_stopped_is_over(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(lines(JOINED, TRAINED))
    (tmp_path / "summary.json").write_text("{}")
    assert JournalLook(tmp_path)()["over"]


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look finds a record more; the table of the last one is what is left."""
    monkeypatch.setattr(report, "WATCH_S", 0.0)
    journal = tmp_path / "journal.jsonl"
    journal.touch()
    coming = iter([JOINED, TRAINED, SYNCED, LEFT])
    with looking(tmp_path, "auto", None) as look:

        def look_later() -> report.Status | None:
            with journal.open("a") as file:
                file.write(lines(next(coming)))
            return look()

        console = Console(file=io.StringIO(), width=80)
        status = report.watch(look_later, console)
    assert next(coming, None) is None
    assert status is not None
    with console.capture() as capture:
        console.print(report.status_tables(status))
    shown = [line.split() for line in capture.get().splitlines()]
    assert ["0", "5", "0.5", "-", "2", "2", "-", "1.0", "MB", "finished"] in shown
    assert ["sync", "1", "0:02", "committed", "0", "1"] in shown


def test_watching_ends_when_nobody_tells_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "WATCH_S", 0.0)
    monkeypatch.setattr(report, "AWAY_S", 0.05)
    assert report.watch(lambda: None, Console(file=io.StringIO())) is None


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no journal\.jsonl in this folder; name the folder of a run"):
        JournalLook(tmp_path)
    (tmp_path / "journal.jsonl").write_text("12\n")
    with pytest.raises(ConfigError, match="not a journal record"):
        JournalLook(tmp_path)()
