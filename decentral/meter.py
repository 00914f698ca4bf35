"""Where a worker's time and bytes went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Meter:
    """Accounts of one worker: seconds computing, talking, waiting, evaluating; bytes and messages sent and received.

    At any instant a worker is *computing* if a local step runs, else *talking* if a packet of its own is on the way in
    or out, else *waiting*. Traffic hidden behind computing is therefore computing.
    """

    __slots__ = (
        "_clock",
        "_computing",
        "_on_spent",
        "_since",
        "_transfers",
        "messages_sent",
        "received_bytes",
        "seconds",
        "sent_bytes",
    )

    def __init__(self, clock: Callable[[], float], on_spent: Callable[[str, float], None] | None = None) -> None:
        """Begin at `clock()`; `on_spent(kind, seconds)` hears of every piece of time as it is booked."""
        self._clock = clock
        self._on_spent = on_spent
        self._since = clock()
        self._computing = ""
        self._transfers = 0
        self.seconds = {"compute": 0.0, "talk": 0.0, "wait": 0.0, "evaluate": 0.0}
        self.sent_bytes = 0
        self.received_bytes = 0
        self.messages_sent = 0

    def settle(self) -> None:
        """Book the time since the last change."""
        now = self._clock()
        if now != self._since:
            self.book(self._activity, now)

    def book(self, kind: str, until: float) -> None:
        """Book the time since the last change, up to `until` on the clock, as time spent on `kind`."""
        self.seconds[kind] += until - self._since
        if self._on_spent is not None:
            self._on_spent(kind, until - self._since)
        self._since = until

    def so_far(self) -> dict[str, float]:
        """Return the seconds of each activity as they are now, and book nothing."""
        activity = self._activity
        return {**self.seconds, activity: self.seconds[activity] + self._clock() - self._since}

    def accounts(self) -> dict[str, Any]:
        """Return the accounts as they are now, which `go_on` takes."""
        self.settle()
        return {
            "seconds": dict(self.seconds),
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "messages_sent": self.messages_sent,
        }

    def go_on(self, seconds: Mapping[str, float], sent_bytes: int, received_bytes: int, messages_sent: int) -> None:
        """Go on with these accounts from now on, in place of what was booked so far."""
        self.settle()
        self.seconds = dict(seconds)
        self.sent_bytes, self.received_bytes, self.messages_sent = sent_bytes, received_bytes, messages_sent

    def close(self) -> None:
        """Book the time since the last change, and tell nobody of what may still come."""
        self.settle()
        self._on_spent = None

    def begin_work(self, kind: str) -> None:
        """From now on the worker does `kind`: "compute" or "evaluate"."""
        self.settle()
        self._computing = kind

    def end_work(self) -> None:
        self.settle()
        self._computing = ""

    def begin_transfer(self) -> None:
        if not self._transfers:
            self.settle()
        self._transfers += 1

    def end_transfer(self) -> None:
        if self._transfers == 1:
            self.settle()
        self._transfers -= 1

    def sent(self, nbytes: int, messages: int = 1) -> None:
        self.sent_bytes += nbytes
        self.messages_sent += messages

    @property
    def _activity(self) -> str:
        return self._computing or ("talk" if self._transfers else "wait")

    @property
    def transfers(self) -> int:
        """Packets on the way in or out now."""
        return self._transfers
