"""Live progress of a run in the terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from decentral.config import Run
from decentral.journal import Evaluated, Joined, Left, Record, Synced, Trained
from decentral.report.summary import size_text

SHOWN = 16
"""Workers that the table has room for."""


@dataclass(slots=True)
class _Row:
    step: int = 0
    loss: float | None = None
    state: str = "starting"
    sent_bytes: int = 0


class LiveView:
    """Shows each worker's step, loss, state, bytes and time left while records come in. A context manager.

    Of a run in virtual time it also says how far that is, how fast it goes and when it may be over, on both clocks.
    """

    def __init__(self, run: Run, console: Console, headline: str, *, virtual: bool = False) -> None:
        self._run = run
        self._headline = headline
        self._virtual = virtual
        self._now_s = 0.0
        self._rows = {worker: _Row() for worker in range(run.fleet.size)}
        self._groups = run.fleet.each()
        self._held_out: dict[str, float] = {}
        self._began: float | None = None
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def see(self, record: Record) -> None:
        """Take in a record."""
        row = self._rows.get(record.worker) or _Row()  # a worker that the run had before it went on with fewer
        self._now_s = record.time_s
        match record:
            case Joined():
                self._began = self._began or time.monotonic()
                row.state = "training"
            case Trained():
                row.step, row.state = record.step, "syncing"
                row.loss = row.loss if record.loss is None else record.loss
            case Synced():
                row.state, row.sent_bytes = "training", record.sent_bytes
            case Evaluated():
                self._held_out = record.metrics
            case Left():
                row.state, row.sent_bytes = record.reason, record.sent_bytes

    def _table(self) -> Table:
        table = Table(title=self._title())
        for column in ("worker", "speed", "step", "", "loss", "state", "sent", "left"):
            table.add_column(column, justify="left" if column == "state" else "right")
        shown = list(zip(self._rows.items(), self._groups, strict=True))[:SHOWN]
        more = [f"and {len(self._rows) - SHOWN} more workers"] if len(self._rows) > SHOWN else []
        table.caption = "\n".join([*more, *self._progress()])
        for (worker, row), group in shown:
            table.add_row(
                str(worker),
                f"{group.speed:g}",
                f"{row.step}/{self._run.steps}",
                ProgressBar(total=self._run.steps, completed=row.step, width=24),
                "-" if row.loss is None else f"{row.loss:.3f}",
                row.state,
                size_text(row.sent_bytes),
                self._time_left(row),
            )
        return table

    def _title(self) -> str:
        title = self._run.rule.spelling()
        if self._headline in self._held_out:
            title += f", held-out {self._headline} {self._held_out[self._headline]:.3f}"
        return title

    def _progress(self) -> list[str]:
        """Return a line about virtual and real time; none for a real run, where they are one."""
        if not self._virtual or self._began is None:
            return []
        real_s = time.monotonic() - self._began
        line = f"{clock_text(self._now_s)} simulated in {clock_text(real_s)}"
        if real_s > 0:
            line += f", {self._now_s / real_s:.3g} times as fast as real time"
        # Who is gone does no more steps; the rest go on as fast as they went, on both clocks.
        at_work = [row for row in self._rows.values() if row.state in ("training", "syncing")]
        done = sum(row.step for row in at_work)
        if done:
            share_left = (self._run.steps * len(at_work) - done) / done
            line += f"; about {clock_text(self._now_s * share_left)} left, in {clock_text(real_s * share_left)}"
        return [line]

    def _time_left(self, row: _Row) -> str:
        if self._began is None or row.step == 0:
            return "-"
        return clock_text((time.monotonic() - self._began) / row.step * (self._run.steps - row.step))


def clock_text(seconds: float) -> str:
    """Return minutes:seconds, with hours in front if there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
