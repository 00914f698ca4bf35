"""Who has been silent for too long. Pure: beats and the time go in as arguments, suspicions come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import nlargest
from statistics import median

from decentral.usual import usual_most


class Detector:
    """Suspects peers by how regularly each of them has been heard so far.

    Peers send a beat every `interval_s` seconds; whatever else comes from them is as good a sign of life. `now`, in
    seconds, is any clock that never goes back. A suspicion ends with the next sign of life, and is no proof of death:
    who acts on it should knock first.

    A peer is suspected after a silence longer than the largest of
    - `BEATS` of its median intervals: single beats may be late or lost;
    - `usual_most` of its intervals: the jitter of its link, which outliers do not blow up;
    - `PAUSE` times the second longest of its intervals: processes that train stall now and then, for as long as they
      have stalled before. The longest alone may have been an outage, and must not blunt the detector for long.

    The third part is what phi-accrual lacks: "The phi accrual failure detector" (Hayashibara et al. 2004) fits a normal
    distribution, and rare long stalls have no place in it; nor has median + k MAD alone. `benchmarks/detector.py` has
    the figures.

    Our own sleep is not their silence: time in which nothing was asked or told here counts as one interval at most.
    So call `suspected` at least every half interval.
    """

    BEATS = 3.0
    PAUSE = 1.5
    """A stall half as long again as the longest known habit is none yet."""
    KEPT = 1000
    """Intervals of a peer that count, as in Hayashibara et al.: enough to have met what happens once in a hundred."""
    ENOUGH = 20
    """Intervals that must be known of a peer; until then it may be silent `STRANGER` times as long."""
    STRANGER = 3.0

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._peers: dict[int, _Peer] = {}
        self._looked: float | None = None
        self._slept_s = 0.0

    def watch(self, workers: Iterable[int], now: float) -> None:
        """Watch these and no others from now on; of those watched already, all that is known is kept."""
        awake = self._awake(now)
        self._peers = {worker: self._peers.get(worker) or _Peer(awake) for worker in workers}

    def heard(self, worker: int, now: float) -> None:
        """There was a sign of life of this worker; of one that is not watched it means nothing."""
        awake = self._awake(now)
        peer = self._peers.get(worker)
        if peer is None:
            return
        if awake - peer.heard >= self._interval_s / 2:  # what comes between beats, or late in a heap, teaches no rhythm
            peer.intervals.append(awake - peer.heard)
            peer.timeout_s = None
        peer.heard = awake

    def suspected(self, now: float) -> list[int]:
        """Return the workers that have been silent past their deadlines, ascending."""
        self._awake(now)
        return sorted(worker for worker in self._peers if now > self.deadline(worker))

    def deadline(self, worker: int) -> float:
        """Return the moment, by the caller's clock, after which a watched worker is suspected if nothing is heard.

        Raises `KeyError` for a worker that is not watched.
        """
        peer = self._peers[worker]
        if peer.timeout_s is None:
            peer.timeout_s = self._timeout_s(peer.intervals)
        return peer.heard + peer.timeout_s + self._slept_s

    def _timeout_s(self, intervals: deque[float]) -> float:
        if len(intervals) < 2:
            return self.STRANGER * self.BEATS * self._interval_s
        usual = max(self._interval_s, median(intervals))
        second_longest = nlargest(2, intervals)[1]
        timeout_s = max(self.BEATS * usual, usual_most(intervals), self.PAUSE * second_longest)
        return timeout_s if len(intervals) >= self.ENOUGH else self.STRANGER * timeout_s

    def _awake(self, now: float) -> float:
        """Return the time by a clock that stands still while we sleep."""
        if self._looked is not None:
            self._slept_s += max(0.0, now - self._looked - self._interval_s)
        self._looked = now
        return now - self._slept_s


class _Peer:
    """What is known of a peer: when it was last heard, by the clock that stands still, and its intervals."""

    def __init__(self, awake: float) -> None:
        self.heard = awake
        self.intervals: deque[float] = deque(maxlen=Detector.KEPT)
        self.timeout_s: float | None = None
