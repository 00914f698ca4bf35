"""Sample leases: one stream of samples that all workers share, handed out in ranges.

Sample `i` of the stream is sample `i` of `task.batch(0, ...)`. Whoever holds a lease on a range trains on it, in the
order of its leases. A range is *settled* when what was trained on it can no longer be lost with one worker: a round it
went into was settled (see `Peer.hands_in`), or the worker finished. What a worker that leaves has not settled is leased
again, before anything fresh. So of the ranges up to the newest lease

    free      given back by somebody: nobody has it
    held      leased to one worker that is in the run, and not settled
    settled

each sample is in one state, and no range is ever held by two. `LeaseBook` is that state machine, without I/O; it learns
what becomes of leases from the journal. The simulator calls it directly; in the real world it lives in the coordinator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from decentral.journal import Lost, Record, Settled
from decentral.members import Members


class Range(NamedTuple):
    """The samples `start .. stop - 1` of the stream."""

    start: int
    stop: int


class Ranges:
    """Ranges in the order in which they are to be used; its length is in samples."""

    __slots__ = ("_length", "_queue")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._queue: deque[Range] = deque()
        self._length = 0
        self.extend(ranges)

    def extend(self, ranges: Iterable[Range]) -> None:
        """Use these after those that are here; neighbours become one."""
        for start, stop in ranges:
            self._length += stop - start
            if self._queue and self._queue[-1].stop == start:
                start = self._queue.pop().start
            self._queue.append(Range(start, stop))

    def first(self, samples: int) -> list[Range]:
        """Return the ranges of the first `samples` samples, of all if there are not so many."""
        found = []
        for start, stop in self._queue:
            if samples <= 0:
                break
            found.append(Range(start, min(stop, start + samples)))
            samples -= stop - start
        return found

    def take(self, samples: int) -> list[Range]:
        """Remove and return the first `samples` samples, all if there are not so many."""
        taken = self.first(samples)
        for start, stop in taken:
            whole = self._queue.popleft()
            self._length -= stop - start
            if stop < whole.stop:
                self._queue.appendleft(Range(stop, whole.stop))
        return taken

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Range]:
        return iter(self._queue)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Return the same samples as ascending ranges that neither touch nor overlap."""
    whole: list[Range] = []
    for start, stop in sorted(ranges):
        if whole and start <= whole[-1].stop:
            start, stop = whole[-1].start, max(stop, whole.pop().stop)
        whole.append(Range(start, stop))
    return whole


class Request(NamedTuple):
    """A worker's wish for leases; whoever has no answer may ask again.

    It knows of `known` samples leased to it since it joined and wants to have been leased `wanted` in all. When it has
    trained on those it knows of, it will have done `step` local steps.
    """

    worker: int
    known: int
    wanted: int
    step: int


class Grant(NamedTuple):
    """What is leased to a worker beyond what it knows of.

    `last_step` is there when the stream is used up: the local step with which every worker's run ends.
    """

    ranges: tuple[Range, ...]
    last_step: int | None = None


class _Account:
    """One worker's leases since it joined: how many samples were `granted`, and those still `held`, in their order."""

    __slots__ = ("granted", "held")

    def __init__(self) -> None:
        self.granted = 0
        self.held = Ranges()


class LeaseBook:
    """Who holds which samples. Ranges begin and end at multiples of `batch_size`.

    `total`: samples to be leased in all, a multiple of `batch_size`; None: without end.
    """

    def __init__(self, batch_size: int, total: int | None = None) -> None:
        self.batch_size, self._total = batch_size, total
        self._fresh = 0  # samples below have been leased before
        self._free: list[Range] = []  # given back, ascending
        self._accounts: dict[int, _Account] = {}
        self._departed = 0
        self._last_step = 0  # of any worker, when it has trained on what it was granted before the stream was used up
        self._used_up = False  # and so it stays, whatever is given back later: somebody may have been told

    @property
    def free(self) -> tuple[Range, ...]:
        """What was given back and has not been leased again, ascending."""
        return tuple(self._free)

    def held(self, worker: int) -> tuple[Range, ...]:
        """Return what the worker has been leased and has not settled, in the order of its leases."""
        return tuple(self._accounts[worker].held) if worker in self._accounts else ()

    def lease(self, request: Request) -> Grant:
        """Lease to a member what it asks for: what was given back first, the lowest first, then fresh ranges.

        The same request once more has the same answer.
        """
        account = self._accounts.setdefault(request.worker, _Account())
        unknown = account.granted - request.known
        samples = request.wanted - account.granted
        if self._used_up:  # nobody goes on for longer than the others
            samples = min(samples, (self._last_step - request.step) * self.batch_size - unknown)
        if samples > 0:
            granted = Ranges(self._take(samples))
            account.held.extend(granted)
            account.granted += len(granted)
            unknown += len(granted)
        if not self._used_up:
            self._last_step = max(self._last_step, request.step + unknown // self.batch_size)
            self._used_up = self._fresh == self._total and not self._free
        rest = Ranges(account.held)
        rest.take(len(rest) - unknown)
        return Grant(tuple(rest), self._last_step if self._used_up else None)

    def saw(self, record: Record) -> None:
        """Take in what a worker's journal says of its leases. Who was given up holds none: it may say what it likes."""
        account = self._accounts.get(record.worker)
        if account is not None and isinstance(record, Settled | Lost):
            ranges = account.held.take(record.samples)
            if isinstance(record, Lost):
                self._give_back(ranges)

    def changed(self, members: Members) -> None:
        """The membership has changed: what those who have gone did not settle is free."""
        for worker in members.departed[self._departed :]:
            account = self._accounts.pop(worker, None)
            if account is not None:
                self._give_back(account.held)
        self._departed = len(members.departed)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint: what is not settled now is to be trained on again after it."""
        held = [each for account in self._accounts.values() for each in account.held]
        return {"leased": self._fresh, "open": [list(each) for each in merged([*self._free, *held])]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin where the book was that returned this `state`, before anybody asks for anything."""
        self._fresh = state["leased"]
        self._free = [Range(start, stop) for start, stop in state["open"]]

    def whole_state(self) -> dict[str, Any]:
        """Return plain values of which `restore_whole` makes this book, with who holds what."""
        return {
            "fresh": self._fresh,
            "free": self._free,
            "accounts": {worker: (each.granted, list(each.held)) for worker, each in self._accounts.items()},
            "departed": self._departed,
            "last_step": self._last_step,
            "used_up": self._used_up,
        }

    def restore_whole(self, state: Mapping[str, Any]) -> None:
        """Be the book that returned this `state`, in the same run."""
        self._fresh, self._departed = state["fresh"], state["departed"]
        self._free = [Range(start, stop) for start, stop in state["free"]]
        self._last_step, self._used_up = state["last_step"], state["used_up"]
        for worker, (granted, held) in state["accounts"].items():
            account = self._accounts[worker] = _Account()
            account.granted = granted
            account.held.extend(Range(start, stop) for start, stop in held)

    def _take(self, samples: int) -> Iterator[Range]:
        while samples > 0 and self._free:
            start, stop = self._free.pop(0)
            if stop - start > samples:
                self._free.insert(0, Range(start + samples, stop))
                stop = start + samples
            samples -= stop - start
            yield Range(start, stop)
        if self._total is not None:
            samples = min(samples, self._total - self._fresh)
        if samples > 0:
            self._fresh += samples
            yield Range(self._fresh - samples, self._fresh)

    def _give_back(self, ranges: Iterable[Range]) -> None:
        self._free = merged([*self._free, *ranges])
