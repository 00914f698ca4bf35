"""A run's status as tables, once or live."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from decentral.report.live import clock_text
from decentral.report.summary import size_text
from decentral.workers.status import Status, WorkerStatus

WATCH_S = 1.0
"""Seconds between two looks at a run that is watched."""
AWAY_S = 10.0
"""Seconds for which a coordinator may be away until its run is taken to be over: its driver starts another one."""


def watch(look: Callable[[], Status | None], console: Console) -> Status | None:
    """Show the status live until the run is over; return the last one, None if there was none."""
    last: Status | None = None
    seen = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while time.monotonic() - seen < AWAY_S:
            status = look()
            if status is not None:
                last, seen = status, time.monotonic()
                live.update(status_tables(status), refresh=True)
            if status is not None and status["over"]:
                break
            time.sleep(WATCH_S)
    return last


def status_tables(status: Status) -> Group:
    """Return the workers' table, and one of the newest rounds if there are any."""
    tables = [_workers(status)]
    if status["rounds"]:
        tables.append(_rounds(status))
    return Group(*tables)


def _workers(status: Status) -> Table:
    heard = any(worker["heard_s"] is not None for worker in status["workers"])
    table = Table(
        title=_title(status), caption=_caption(status), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in ("worker", "step", "loss", "s/step", "s/round", "last", "comp/talk/wait", "sent", *["heard"] * heard):
        table.add_column(column, justify="right")
    table.add_column("state")
    for worker in status["workers"]:
        table.add_row(
            _name(worker),
            str(worker["step"]),
            _number(worker["loss"]),
            _number(worker["step_s"]),
            _number(worker["round_s"]),
            _number(worker["last_round_s"]),
            _shares(worker["shares"]),
            size_text(worker["sent_bytes"]),
            *["-" if worker["heard_s"] is None else f"{worker['heard_s']:.0f} s ago"] * heard,
            worker["state"] if worker["slow"] is None else f"slow: {worker['slow']}",
        )
    return table


def _rounds(status: Status) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("channel", "round", "at", "outcome", "members"):
        table.add_column(column, justify="right" if column in ("round", "at") else "left")
    for each in status["rounds"]:
        members = " ".join(map(str, each["members"]))
        table.add_row(each["channel"], str(each["round"]), clock_text(each["time_s"]), each["outcome"], members)
    return table


def _title(status: Status) -> str:
    parts = [status["run"], f"{clock_text(status['time_s'])} into the run", f"{len(status['members'])} members"]
    if status["epoch"] is not None:
        parts.append(f"epoch {status['epoch']}")
    return ", ".join([*parts, *["over"] * status["over"]])


def _caption(status: Status) -> str:
    """Return a line for each slow worker, one for what was evaluated, and one for records that are held back."""
    lines = [
        f"worker {worker['worker']} is slow: {worker['slow']}, {worker['times']:.1f} times the others' median"
        for worker in status["workers"]
        if worker["slow"] is not None
    ]
    held_out = ", ".join(f"held-out {name} {value:.3f}" for name, value in status["metrics"].items())
    waiting = f"{status['held_back']} records wait for the driver" if status["held_back"] else ""
    return "\n".join([*lines, *filter(None, (held_out, waiting))])


def _name(worker: WorkerStatus) -> str:
    life = f" (life {worker['incarnation']})" if worker["incarnation"] else ""
    return f"{worker['worker']}{life}" + (f" at {worker['node']}" if worker["node"] else "")


def _shares(shares: dict[str, float]) -> str:
    if not shares:
        return "-"
    return "/".join(f"{100 * shares.get(activity, 0.0):.0f}" for activity in ("compute", "talk", "wait")) + " %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
