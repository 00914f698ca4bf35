"""Who is in the run, and what every round came to: one deterministic state machine without I/O.

The simulator calls `Roster` directly; in the real world it lives in the coordinator. Both feed it the same four inputs
(admit, remove, vote, time does not enter) and hand out its answers.

Life of a round, as the roster sees it. A round is a (channel, round) pair; an attempt at it is made by the members of
one epoch. Each member of the attempt votes once: the digest of what it staged, or None if it could stage nothing.

    state of the attempt                             answer to its voters
    -----------------------------------------------  ---------------------------------------------------------
    all live members voted, digests equal            committed, or degraded if an earlier attempt had members
                                                     that this one lacks; the round is decided
    a vote is None or differs, epoch is the newest   skipped; the round is decided
    a vote is None or differs, epoch has advanced    again, with the newest members (a dead member is the reason)
    otherwise                                        none yet: wait for votes, or for a death

Why nobody waits for ever: a member that cannot go on votes None (its receive met a death or a deadline), a member that
dies is removed, and either event completes the attempt. Why survivors agree: the decision for a round is made once, is
kept, and is what late voters are told; and a digest only counts if every live member of the attempt holds the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["committed", "degraded", "skipped", "again"]
DECISIONS_KEPT = 1024


class Members:
    """The workers of the run as of `epoch`, in ascending order. Every join and every leave begins a new epoch.

    `finished` are those who have left because they had done their part; who died is in neither.
    """

    __slots__ = ("_hash", "_ranks", "epoch", "finished", "ids")

    def __init__(self, epoch: int, ids: tuple[int, ...], finished: tuple[int, ...] = ()) -> None:
        self._become(epoch, tuple(sorted(ids)), finished)
        self._rank_of()

    def _become(self, epoch: int, ids: tuple[int, ...], finished: tuple[int, ...]) -> None:
        self.epoch = epoch
        self.ids = ids
        self.finished = finished
        self._hash: int | None = None  # this and the ranks on demand: thousands of workers may leave one by one
        self._ranks: dict[int, int] | None = None

    def rank(self, worker: int) -> int:
        """Return the worker's place among the members; raises `KeyError` if it is none."""
        return self._rank_of()[worker]

    def without(self, worker: int, finished: bool = False) -> Members:
        """Return the members of the next epoch, when `worker` has finished or died."""
        place = bisect_left(self.ids, worker)
        stop = place + 1 if worker in self else place
        members = Members.__new__(Members)
        done = (*self.finished, worker) if finished else self.finished
        members._become(self.epoch + 1, self.ids[:place] + self.ids[stop:], done)
        return members

    def _rank_of(self) -> dict[int, int]:
        if self._ranks is None:
            self._ranks = {worker: rank for rank, worker in enumerate(self.ids)}
        return self._ranks

    def __contains__(self, worker: int) -> bool:
        if self._ranks is not None:
            return worker in self._ranks
        place = bisect_left(self.ids, worker)
        return place < len(self.ids) and self.ids[place] == worker

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Members) and (self.epoch, self.ids) == (other.epoch, other.ids)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.epoch, self.ids))
        return self._hash

    def __repr__(self) -> str:
        return f"Members(epoch={self.epoch}, ids={self.ids})"


@dataclass(frozen=True, slots=True)
class Ballot:
    """A worker's vote on its attempt at a round: the digest of what it staged, None if it could not."""

    worker: int
    channel: str
    round: int
    epoch: int
    digest: int | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a round came to; `members` contributed, or (outcome "again") are to try next."""

    outcome: Outcome
    members: Members


@dataclass(slots=True)
class _Attempt:
    members: Members
    votes: dict[int, Callable[[Decision], None]] = field(default_factory=dict)
    digests: set[int | None] = field(default_factory=set)


@dataclass(slots=True)
class _Round:
    began_with: set[int] = field(default_factory=set)  # members of its attempts so far
    attempts: dict[int, _Attempt] = field(default_factory=dict)


class Roster:
    """Membership and decisions of one run. `on_change(members, gone)` is called after every change."""

    def __init__(self, workers: tuple[int, ...], on_change: Callable[[Members, int], None]) -> None:
        self.members = Members(0, workers)
        self._departed: list[int] = []  # the k-th to leave began epoch k
        self._on_change = on_change
        self._open: dict[tuple[str, int], _Round] = {}
        self._decided: OrderedDict[tuple[str, int], Decision] = OrderedDict()

    def remove(self, worker: int, finished: bool = False) -> None:
        """The worker is dead or has finished; nothing, if it is no member. Completes attempts that waited for it."""
        members = self.members.without(worker, finished)
        if len(members) == len(self.members):
            return
        self.members = members
        self._departed.append(worker)
        self._on_change(self.members, worker)
        for key, round_ in list(self._open.items()):
            for epoch, attempt in list(round_.attempts.items()):
                answer = attempt.votes.pop(worker, None)
                if answer is not None:
                    answer(Decision("skipped", self.members))
                self._settle(key, epoch)

    def vote(self, ballot: Ballot, answer: Callable[[Decision], None]) -> None:
        """Take a vote; `answer` is called once, now or when the attempt is complete.

        A vote of somebody who is no member any more, or stops being one before there is an answer, is answered
        "skipped": it has been declared dead. A repeated vote takes the place of the first.
        """
        key = (ballot.channel, ballot.round)
        if ballot.worker not in self.members or not 0 <= ballot.epoch <= self.members.epoch:
            answer(Decision("skipped", self.members))
            return
        if key in self._decided:
            answer(self._decided[key])
            return
        attempt = self._attempt(key, ballot.epoch)
        attempt.votes[ballot.worker] = answer
        attempt.digests.add(ballot.digest)
        self._settle(key, ballot.epoch)

    def _attempt(self, key: tuple[str, int], epoch: int) -> _Attempt:
        """Return the attempt at a round by the members of `epoch`, begun now if need be."""
        round_ = self._open.get(key)
        if round_ is None:
            round_ = self._open[key] = _Round()
        if epoch not in round_.attempts:
            members = self._members_at(epoch)
            round_.attempts[epoch] = _Attempt(members)
            round_.began_with.update(members)
        return round_.attempts[epoch]

    def _members_at(self, epoch: int) -> Members:
        """Return who was in the run at `epoch`: those who are now, and those who left since. Nobody joins later."""
        if epoch == self.members.epoch:
            return self.members
        return Members(epoch, (*self.members.ids, *self._departed[epoch:]))

    def _settle(self, key: tuple[str, int], epoch: int) -> None:
        round_ = self._open.get(key)
        if round_ is None or epoch not in round_.attempts:
            return
        attempt = round_.attempts[epoch]
        failed = None in attempt.digests or len(attempt.digests) > 1
        if failed and epoch < self.members.epoch:
            self._answer(attempt, Decision("again", self.members))  # its digests stay: late votes are told the same
        elif failed:
            self._decide(key, Decision("skipped", attempt.members))
        elif self._complete(attempt):
            whole = round_.began_with <= set(attempt.members)
            self._decide(key, Decision("committed" if whole else "degraded", attempt.members))

    def _complete(self, attempt: _Attempt) -> bool:
        left_since = self.members.epoch - attempt.members.epoch
        if len(attempt.votes) < len(attempt.members) - left_since:
            return False  # found without a look at every member: each of them asks this at its vote
        return all(worker in attempt.votes for worker in attempt.members if worker in self.members)

    def _decide(self, key: tuple[str, int], decision: Decision) -> None:
        self._decided[key] = decision
        while len(self._decided) > DECISIONS_KEPT:
            self._decided.popitem(last=False)
        for attempt in self._open.pop(key).attempts.values():
            self._answer(attempt, decision)

    def _answer(self, attempt: _Attempt, decision: Decision) -> None:
        votes, attempt.votes = attempt.votes, {}
        for worker in sorted(votes):
            votes[worker](decision)
