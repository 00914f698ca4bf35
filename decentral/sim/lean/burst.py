"""The butterfly all-reduces of one round, of one or several pieces, from the workers' beginnings to the last mean.

Long pieces go in segments. A *part* is a segment of a piece; a worker does with the parts of a piece what
`butterfly_mean` does: sends part k, reduces part k - AHEAD, collects the means of part k - AHEAD - 1, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from decentral.protocols.collectives import AHEAD
from decentral.sim.lean.bulk import Array, Bulk

SCATTER, GATHER = 0, 1
"""What a flow is: a worker's values for somebody's chunk, or a chunk's mean."""


class Burst:
    """All workers' parts in it. `now`, in seconds since the round began, is the end of it when `run` has returned.

    `talk_s` and `wait_s` `[workers]` are how long each has talked and waited so far, after its last piece was final.
    """

    def __init__(
        self,
        lines: Bulk,
        latency_s: Array,
        segments: Sequence[int],
        begins: Array,
        owns: Array,
        nbytes: Callable[[int, int], Array],
    ) -> None:
        """Part p is segment `segments[p]` of its piece and final at worker w at `begins[p, w]`.

        Worker w owns a chunk of it if `owns[p, w]`.
        `nbytes(kind, part)` are the bytes from each worker to each other one `[workers, workers]`, 0 for no message.
        """
        self._lines, self._latency_s, self._begins, self._nbytes = lines, latency_s, begins, nbytes
        workers = begins.shape[1]
        self._segment = np.array(segments)
        self._starts = np.unique(begins)
        self._computes_until = begins.max(axis=0)
        # By kind: messages that have not come, of all other workers and of all other owners.
        self._awaited = np.stack([owns * (workers - 1), owns.sum(axis=1, keepdims=True) - owns])
        self._begun, self._reduced, self._staged = (np.zeros(begins.shape, bool) for _ in range(3))
        self._reduced_at, self._staged_at = np.zeros(begins.shape), np.zeros(begins.shape)
        self._busy = np.zeros(workers, np.int64)  # packets on the way in or out
        self.now = float(self._starts[0])
        self.talk_s, self.wait_s = np.zeros(workers), np.zeros(workers)

    def run(self) -> None:
        """Let everything happen."""
        self._act()
        while not self._staged.all():
            self._advance()
            self._act()

    def longest_wait_s(self) -> float:
        """Return the longest that anybody waited to reduce a part, or for the means of one."""
        reduced, staged = self._reduced_at, self._staged_at
        asked = np.maximum(self._begins, np.maximum(self._earlier(reduced, 1, 0.0), self._earlier(staged, 2, 0.0)))
        collects = np.maximum(reduced, np.maximum(self._later(reduced, 0.0), self._earlier(staged, 1, 0.0)))
        return float(max((reduced - asked).max(), (staged - collects).max()))

    def _act(self) -> None:
        """Have everybody do what it can do now."""
        acts = True
        while acts:
            begun = (self._begins <= self.now) & ~self._begun
            begun &= self._earlier(self._reduced, AHEAD + 1, True) & self._earlier(self._staged, AHEAD + 2, True)
            self._begun |= begun
            self._send(SCATTER, begun)
            reduced = self._begun & ~self._reduced & (self._awaited[SCATTER] == 0)
            reduced &= self._earlier(self._reduced, 1, True) & self._earlier(self._staged, 2, True)
            self._reduced |= reduced
            self._reduced_at[reduced] = self.now
            self._send(GATHER, reduced)
            staged = self._reduced & ~self._staged & (self._awaited[GATHER] == 0)
            staged &= self._earlier(self._staged, 1, True) & self._later(self._reduced, True)
            self._staged |= staged
            self._staged_at[staged] = self.now
            acts = bool(begun.any() or reduced.any() or staged.any())

    def _earlier(self, of: Array, parts: int, none: object) -> Array:
        """Return `of[part - parts]` for each part, `none` where the piece has no such part."""
        shifted = np.full_like(of, none)
        shifted[parts:] = of[: max(0, len(of) - parts)]
        shifted[self._segment < parts] = none
        return shifted

    def _later(self, of: Array, none: object) -> Array:
        """Return `of[part + 1]` for each part, `none` where the piece ends with it."""
        shifted = np.full_like(of, none)
        shifted[:-1] = of[1:]
        shifted[:-1][self._segment[1:] == 0] = none
        return shifted

    def _send(self, kind: int, who: Array) -> None:
        """Send what these workers have to send of these parts."""
        for part in np.flatnonzero(who.any(axis=1)).tolist():
            senders = np.flatnonzero(who[part])
            nbytes = self._nbytes(kind, part)[senders]
            row, to = np.nonzero(nbytes)
            source = senders[row]
            number = kind * len(who) + part
            self._lines.send(source, to, number, 8.0 * nbytes[row, to], self._latency_s[source, to], self.now)
            self._count(source, to, 1)

    def _advance(self) -> None:
        """Let time pass until something happens."""
        after = np.searchsorted(self._starts, self.now, side="right")
        next_start = float(self._starts[after]) if after < len(self._starts) else math.inf
        when = min(next_start, self._lines.next_arrival())
        if when > self.now:  # all that begins to send at this instant has begun
            when = min(when, self._lines.share(self.now))
        idle = self._computes_until <= self.now
        self.talk_s[idle & (self._busy > 0)] += when - self.now
        self.wait_s[idle & (self._busy == 0)] += when - self.now
        self.now = when
        arrived = self._lines.advance(when)
        self._count(arrived.source, arrived.to, -1)
        places = arrived.kind * len(self._busy) + arrived.to
        self._awaited -= np.bincount(places, minlength=self._awaited.size).reshape(self._awaited.shape)

    def _count(self, source: Array, to: Array, change: int) -> None:
        """Count flows that have begun (1) or arrived (-1)."""
        for ends in (source, to):
            self._busy += change * np.bincount(ends, minlength=len(self._busy))
