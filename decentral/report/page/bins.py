"""Sums over time in bounded memory, however long the time turns out to be."""

from __future__ import annotations

from collections.abc import Hashable

LIMIT = 512
"""Bins there are at most; more than half of them are in use when their width has doubled at least once."""

FIRST_WIDTH_S = 2.0**-20
"""A power of two, as all widths are: dividing by one rounds nothing, so a time is in one bin for certain."""


class Bins:
    """Amounts by key and time, summed in equal bins from 0 s on.

    When a time lies beyond the last bin, the width doubles and neighbours are added up: sums stay what they were.
    """

    def __init__(self) -> None:
        self.width_s = FIRST_WIDTH_S
        self._sums: dict[Hashable, list[float]] = {}

    def add(self, key: Hashable, time_s: float, amount: float) -> None:
        """Add an amount at a time, not before 0 s."""
        self.reach(time_s)
        self._of(key)[int(time_s / self.width_s)] += amount

    def spread(self, key: Hashable, since_s: float, until_s: float, amount: float) -> None:
        """Add an amount evenly over a time; at its end if it has no length."""
        since_s = max(0.0, since_s)
        if until_s <= since_s:
            self.add(key, until_s, amount)
            return
        self.reach(until_s)
        sums = self._of(key)
        since, until = since_s / self.width_s, until_s / self.width_s
        first, last = int(since), int(until)
        if first == last:
            sums[first] += amount
            return
        each = amount / (until - since)
        sums[first] += each * (first + 1 - since)
        for place in range(first + 1, last):
            sums[place] += each
        sums[last] += each * (until - last)

    def sums(self, key: Hashable, count: int) -> list[float]:
        """Return the first `count` sums of the key; zeros for one that nothing was added to."""
        return self._sums.get(key, [0.0] * LIMIT)[:count]

    def _of(self, key: Hashable) -> list[float]:
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = [0.0] * LIMIT
        return sums

    def reach(self, time_s: float) -> None:
        """Have a bin for that time."""
        while time_s >= self.width_s * LIMIT:
            self.width_s *= 2
            for key, sums in self._sums.items():
                halves = [first + second for first, second in zip(sums[::2], sums[1::2], strict=True)]
                self._sums[key] = halves + [0.0] * (LIMIT // 2)
