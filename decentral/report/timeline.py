"""A run as a timeline that opens in Perfetto (ui.perfetto.dev) and chrome://tracing, from its journal alone.

The file is Chrome's trace-event format, JSON object form ("Trace Event Format", the Chromium project): a process for
each worker, in it a track each for computing and talking and one for the rounds of each channel, a counter of what it
sends, and a mark where it joins, leaves or evaluates. Times are virtual for simulated runs.

A watched run (`Spent` records) shows all that a worker did. Any other journal has the local phases of `Trained`, and
none for rules that drive single gradients, whose records do not say when those began.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from decentral.journal import Evaluated, Joined, Left, Record, Spent, Synced, Trained

Event = dict[str, Any]
"""One trace event: `ph` is its kind, `pid` and `tid` its track, `ts` and `dur` are in microseconds."""

COMPUTE, TALK, MARKS, FIRST_CHANNEL = 1, 2, 3, 4
"""Tracks of a worker. Rounds of one channel do not overlap, those of two may: each channel has a track of its own."""

TOUCHING_S = 1e-9
"""Pieces of one activity that are less than this apart are one."""


def write_timeline(records: Iterable[Record], path: Path) -> None:
    """Write the timeline of a journal, one event a line. Raises `OSError` as writing files does."""
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for number, event in enumerate(timeline(records)):
            file.write((",\n" if number else "") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")


def timeline(records: Iterable[Record]) -> Iterator[Event]:
    """Yield the trace events of a journal, those of each track in the order of their times."""
    workers: dict[int, _Worker] = {}
    for record in records:
        worker = workers.get(record.worker)
        if worker is None:
            worker = workers[record.worker] = _Worker(record.worker)
            yield from worker.begin()
        yield from worker.see(record)
    for worker in workers.values():
        yield from worker.end()


@dataclass(slots=True)
class _Piece:
    """An activity that may go on."""

    activity: str
    since_s: float
    until_s: float


@dataclass(slots=True)
class _Worker:
    number: int
    watched: bool = False
    piece: _Piece | None = None
    rounds_since: dict[str, float] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    joined_at: float = 0.0
    sent_bytes: int = 0
    counted_until: float = 0.0

    def begin(self) -> Iterator[Event]:
        yield self._event("M", name="process_name", args={"name": f"worker {self.number}"})
        yield self._event("M", name="process_sort_index", args={"sort_index": self.number})
        for track, name in ((COMPUTE, "compute"), (TALK, "talk"), (MARKS, "marks")):
            yield self._track(track, name)

    def see(self, record: Record) -> Iterator[Event]:
        match record:
            case Joined():
                self.joined_at = self.counted_until = record.time_s
                self.rounds_since.clear()
                self.sent_bytes = 0
                yield self._mark("joined", record.time_s)
            case Spent():
                self.watched = True
                yield from self._spent(record.activity, record.time_s - record.seconds, record.time_s)
            case Trained():
                if not self.watched and record.seconds > 0:
                    name = f"steps to {record.step}"
                    args = {"samples": record.samples, "loss": record.loss}
                    yield self._span(COMPUTE, name, record.time_s - record.seconds, record.time_s, args)
            case Synced():
                yield from self._round(record)
                yield from self._count(record.sent_bytes, record.time_s)
            case Evaluated():
                metrics = {name: value if isfinite(value) else str(value) for name, value in record.metrics.items()}
                yield self._mark("evaluated", record.time_s, {"step": record.step, **metrics})
            case Left():
                yield from self._count(record.sent_bytes, record.time_s)
                yield from self.end()
                yield self._event("C", name="sent", ts=_us(record.time_s), args={"Mbit/s": 0.0})
                yield self._mark(record.reason, record.time_s, {"step": record.step, **record.seconds})

    def end(self) -> Iterator[Event]:
        """Close what is open."""
        piece, self.piece = self.piece, None
        if piece is not None and piece.activity != "wait":
            track = TALK if piece.activity == "talk" else COMPUTE
            yield self._span(track, piece.activity, piece.since_s, piece.until_s)

    def _spent(self, activity: str, since_s: float, until_s: float) -> Iterator[Event]:
        piece = self.piece
        if piece is not None and piece.activity == activity and since_s - piece.until_s < TOUCHING_S:
            piece.until_s = until_s
        else:
            yield from self.end()
            self.piece = _Piece(activity, since_s, until_s)

    def _round(self, record: Synced) -> Iterator[Event]:
        """Draw a round from the end of the one before it: the local phase is a part of it."""
        if record.channel not in self.channels:
            self.channels[record.channel] = FIRST_CHANNEL + len(self.channels)
            yield self._track(self.channels[record.channel], f"rounds: {record.channel}")
        since_s = self.rounds_since.get(record.channel, self.joined_at)
        self.rounds_since[record.channel] = record.time_s
        args = {"outcome": record.outcome, "members": list(record.members)}
        name = f"{record.round} {record.outcome}"
        yield self._span(self.channels[record.channel], name, since_s, record.time_s, args)

    def _count(self, sent_bytes: int, now_s: float) -> Iterator[Event]:
        """Count what was sent since the last time that somebody said how much, at its mean rate."""
        if now_s > self.counted_until:
            mbps = 8e-6 * (sent_bytes - self.sent_bytes) / (now_s - self.counted_until)
            yield self._event("C", name="sent", ts=_us(self.counted_until), args={"Mbit/s": mbps})
            self.sent_bytes, self.counted_until = sent_bytes, now_s

    def _track(self, track: int, name: str) -> Event:
        return self._event("M", name="thread_name", tid=track, args={"name": name})

    def _span(self, track: int, name: str, since_s: float, until_s: float, args: Event | None = None) -> Event:
        ts = _us(since_s)
        return self._event("X", name=name, tid=track, ts=ts, dur=round(_us(until_s) - ts, 3), args=args or {})

    def _mark(self, name: str, at_s: float, args: Event | None = None) -> Event:
        return self._event("i", name=name, tid=MARKS, ts=_us(at_s), s="p", args=args or {})

    def _event(self, ph: str, *, tid: int = 0, **fields: Any) -> Event:
        return {"ph": ph, "pid": self.number + 1, "tid": tid, **fields}  # viewers take process 0 for the idle one


def _us(seconds: float) -> float:
    """Return microseconds to the nanosecond, which is what viewers keep: what touches here does so there."""
    return round(seconds * 1e6, 3)
