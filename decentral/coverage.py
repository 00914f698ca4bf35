"""What a journal proves of the samples of a run with leases: which were consumed, and which more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from decentral.errors import VerificationError
from decentral.journal import Joined, Leased, Left, Lost, Record, Settled, Trained
from decentral.leases import Range, Ranges, merged


class Repeat(NamedTuple):
    """The samples `start .. stop - 1` were each trained on so many `times`, which is more than once."""

    start: int
    stop: int
    times: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of the samples `0 .. samples - 1`, all that were ever leased. Ranges ascend and do not touch."""

    samples: int
    missing: tuple[Range, ...]
    """Never settled: nobody trained on them, or what came of it was lost."""
    repeated: tuple[Repeat, ...]
    """Trained on more than once, whether or not what came of it was lost the first time."""

    @property
    def consumed(self) -> int:
        """How many samples from the first on were settled, each at least once, before the first that was not."""
        return self.missing[0].start if self.missing else self.samples


def coverage(records: Iterable[Record]) -> Coverage:
    """Return what the journal of a run with leases proves of its samples.

    Raises `VerificationError` if somebody trained on what it had not leased, or settled what it had not trained on.
    """
    tally = Tally()
    for record in records:
        tally.see(record)
    return tally.coverage()


class Tally:
    """Follows each worker's leases through a journal, record by record."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}
        self._leased: list[Range] = []
        self._trained: list[Range] = []
        self._settled: list[Range] = []

    def see(self, record: Record) -> None:
        """Take in the next record. Raises `VerificationError` as `coverage` does."""
        if isinstance(record, Leased):
            self._leased.append(Range(record.start, record.stop))
            self._account(record).held.extend([self._leased[-1]])
        elif not self._leased:
            return  # as far as we know this run has no leases
        elif isinstance(record, Trained):
            ranges = self._moved(record, "trained on", "leased", self._account(record).held)
            self._trained += ranges
            self._account(record).trained.extend(ranges)
        elif isinstance(record, Settled):
            self._settled += self._moved(record, "settled", "trained on", self._account(record).trained)
        elif isinstance(record, Lost):
            self._moved(record, "lost", "trained on", self._account(record).trained)
        elif isinstance(record, Joined | Left):
            self._accounts.pop(record.worker, None)

    def coverage(self) -> Coverage:
        """Return what the records seen so far prove."""
        samples = max((stop for _, stop in self._leased), default=0)
        return Coverage(samples, tuple(_gaps(self._settled, samples)), tuple(_repeats(self._trained)))

    def _account(self, record: Record) -> _Account:
        return self._accounts.setdefault(record.worker, _Account())

    def _moved(self, record: Trained | Settled | Lost, did: str, had: str, source: Ranges) -> list[Range]:
        if record.samples > len(source):
            raise VerificationError(
                f"worker {record.worker}, '{record.kind}' at {record.time_s} s: it {did} {record.samples} samples, of "
                f"which it had {had} {len(source)}"
            )
        return source.take(record.samples)


class _Account:
    """One worker's leases since it joined: those it has yet to train on, and those it has and that are undecided."""

    __slots__ = ("held", "trained")

    def __init__(self) -> None:
        self.held, self.trained = Ranges(), Ranges()


def _gaps(ranges: Iterable[Range], stop: int) -> Iterator[Range]:
    """Yield what of `0 .. stop - 1` is in none of the ranges."""
    place = 0
    for start, end in merged(ranges):
        if start > place:
            yield Range(place, start)
        place = end
    if place < stop:
        yield Range(place, stop)


def _repeats(ranges: Iterable[Range]) -> Iterator[Repeat]:
    """Yield what is in more than one of the ranges."""
    changes: Counter[int] = Counter()
    for start, stop in ranges:
        changes[start] += 1
        changes[stop] -= 1
    since, times = 0, 0
    for place in sorted(place for place, change in changes.items() if change):
        if times > 1:
            yield Repeat(since, place, times)
        since, times = place, times + changes[place]
