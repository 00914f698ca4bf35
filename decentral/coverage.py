"""What a journal proves of the samples of a run with leases: which were consumed, and which more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from decentral.errors import VerificationError
from decentral.journal import Joined, Leased, Left, Lost, Record, Settled, Trained
from decentral.leases import Range, Ranges


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
        self._samples = 0  # leased, of the stream
        self._trained, self._settled = _Depths(), _Depths()

    def see(self, record: Record) -> None:
        """Take in the next record. Raises `VerificationError` as `coverage` does."""
        if isinstance(record, Leased):
            self._samples = max(self._samples, record.stop)
            self._account(record).held.extend([Range(record.start, record.stop)])
        elif not self._samples:
            return  # as far as we know this run has no leases
        elif isinstance(record, Trained):
            ranges = self._moved(record, "trained on", "leased", self._account(record).held)
            self._trained.add(ranges)
            self._account(record).trained.extend(ranges)
        elif isinstance(record, Settled):
            self._settled.add(self._moved(record, "settled", "trained on", self._account(record).trained))
        elif isinstance(record, Lost):
            self._moved(record, "lost", "trained on", self._account(record).trained)
        elif isinstance(record, Joined | Left):
            self._accounts.pop(record.worker, None)

    def coverage(self) -> Coverage:
        """Return what the records seen so far prove."""
        missing = [Range(start, stop) for start, stop, times in self._settled.spans(self._samples) if not times]
        repeated = [Repeat(*span) for span in self._trained.spans(self._samples) if span[2] > 1]
        return Coverage(self._samples, tuple(missing), tuple(repeated))

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


class _Depths:
    """In how many of the ranges each sample is. Kept is where that changes, so neighbours leave nothing behind."""

    def __init__(self) -> None:
        self._changes: Counter[int] = Counter()

    def add(self, ranges: Iterable[Range]) -> None:
        for start, stop in ranges:
            self._change(start, 1)
            self._change(stop, -1)

    def spans(self, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut `0 .. stop - 1` where the number changes: yield start, stop and number of each piece."""
        since, times = 0, 0
        for place, change in sorted({**self._changes, stop: 0}.items()):
            if place > since:
                yield since, place, times
            since, times = place, times + change

    def _change(self, place: int, by: int) -> None:
        self._changes[place] += by
        if not self._changes[place]:
            del self._changes[place]
