"""How long local steps take: our own as measured, the others' as they say."""

from __future__ import annotations

import math
from collections.abc import Iterable

from decentral.wire import FrameError, Packet, Tag, signal, signal_text

TOLD = Tag("speed", 0)
"""Under this tag workers tell each other, as often as they like."""
NEWEST_SHARE = 0.1
"""Of one local step in the running mean, which so is about the last ten, or a whole long phase."""


class Speeds:
    """Seconds of computing that a local step takes; `own` is a running mean, None until it has been measured twice.

    The first measurement is dropped: it is of allocations, cold caches and compilers as much as of the step. `own` is
    `rough` while it is one measurement alone.
    What others say is not checked, for it cannot be: whoever uses it must bound what a lie may do.
    """

    def __init__(self) -> None:
        self.own: float | None = None
        self._measurements = 0
        self._told: dict[int, float] = {}

    def measured(self, steps: int, seconds: float) -> None:
        """We have computed so many local steps in so many seconds, both above 0."""
        self._measurements += 1
        if self._measurements == 1:
            return
        step_s = seconds / steps
        known_s = step_s if self.own is None else self.own
        self.own = known_s + (1 - (1 - NEWEST_SHARE) ** steps) * (step_s - known_s)

    @property
    def rough(self) -> bool:
        return self._measurements <= 2

    def told(self, source: int, packet: Packet) -> None:
        """`source` says how long its steps take. Raises `FrameError` if that is no positive, finite number."""
        text = signal_text(packet)
        try:
            step_s = float(text)
        except ValueError:
            step_s = math.nan
        if not 0 < step_s < math.inf:
            raise FrameError("codec", f"a step of {text!r} seconds")
        self._told[source] = step_s

    def of(self, workers: Iterable[int]) -> list[float]:
        """Return the seconds a step of those of the `workers` who have told."""
        return [self._told[worker] for worker in workers if worker in self._told]

    def packet(self) -> Packet:
        """Return what tells the others of `own`, which is known."""
        return signal(repr(self.own))
