"""Who is in the run, and what every round came to: one deterministic state machine without I/O.

The simulator calls `Roster` directly; in the real world it lives in the coordinator. Both feed it the same four inputs
(join, admit, remove, vote; time does not enter) and hand out its answers.

Life of a round, as the roster sees it. A round is a (channel, round) pair; an attempt at it is made by the members of
one epoch. Each member of the attempt votes once: the digest of what it staged, or None if it could stage nothing.
Epochs are the channel's own: they count the departures and whom the channel has admitted. A round may be of a group
alone: to it, nobody else exists.

    state of the attempt                             answer to its voters
    -----------------------------------------------  ---------------------------------------------------------
    all live members voted, digests equal            committed, or degraded if an earlier attempt had members
                                                     that this one lacks; the round is decided
    a vote is None or differs, epoch is the newest   skipped; the round is decided
    a vote is None or differs, epoch has advanced    again, with the newest members (a dead member is the reason)
    otherwise                                        none yet: wait for votes, or for a death

What changes the roster is told to `on_entry` as it happens, plain values alone; `replay` of these entries makes another
roster that decides and answers likewise. Votes on rounds that are still open are not among them: who has had no answer
votes again.

A member may be removed on suspicion: nobody hears of it, but nobody has seen it die. While those in doubt are as many
as those who are left, no round is committed: the others may be a majority beyond a cut, which believes the same of us.

Why nobody waits for ever: a member that cannot go on votes None (its receive met a death or a deadline), a member that
dies is removed, and either event completes the attempt. Why survivors agree: the decision for a round is made once, is
kept, and is what late voters are told; and a digest only counts if every live member of the attempt holds the same.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Outcome = Literal["committed", "degraded", "skipped", "again"]
DECISIONS_KEPT = 1024


class Members:
    """The workers of the run as of `epoch`, in ascending order. Every change begins a new epoch.

    `departed` are those who have left, in that order, and of these `finished` had done their part. Who comes to a run
    that has begun is a *guest*: there, but in none of its rounds until it is admitted, channel by channel (see
    `party`); `guests` says to which it has been, and "" stands for all that needs no vote.
    """

    __slots__ = ("_hash", "_parties", "_ranks", "admitted", "departed", "epoch", "finished", "guests", "ids")

    def __init__(
        self,
        epoch: int,
        ids: tuple[int, ...],
        finished: tuple[int, ...] = (),
        departed: tuple[int, ...] = (),
        guests: Mapping[int, frozenset[str]] | None = None,
        admitted: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._become(epoch, tuple(sorted(ids)), finished, departed, guests or {}, admitted or {})
        self._rank_of()

    def _become(
        self,
        epoch: int,
        ids: tuple[int, ...],
        finished: tuple[int, ...],
        departed: tuple[int, ...],
        guests: Mapping[int, frozenset[str]],
        admitted: Mapping[str, tuple[int, ...]],
    ) -> Members:
        self.epoch = epoch
        self.ids = ids
        self.finished = finished
        self.departed = departed
        self.guests = guests
        self.admitted = admitted  # by channel, everybody it ever admitted, in that order
        self._hash: int | None = None  # this and the ranks on demand: thousands of workers may leave one by one
        self._ranks: dict[int, int] | None = None
        self._parties: dict[tuple[str, tuple[int, ...]], Members] = {}
        return self

    def rank(self, worker: int) -> int:
        """Return the worker's place among the members; raises `KeyError` if it is none."""
        return self._rank_of()[worker]

    def without(self, worker: int, finished: bool = False) -> Members:
        """Return the members of the next epoch, when `worker` has finished or died."""
        place = bisect_left(self.ids, worker)
        stop = place + 1 if worker in self else place
        guests = {guest: channels for guest, channels in self.guests.items() if guest != worker}
        return Members.__new__(Members)._become(
            self.epoch + 1,
            self.ids[:place] + self.ids[stop:],
            (*self.finished, worker) if finished else self.finished,
            (*self.departed, worker),
            guests,
            self.admitted,
        )

    def with_guest(self, worker: int, takes_part: bool = False) -> Members:
        """Return the members of the next epoch, when `worker` has come, as a guest unless it `takes_part` at once."""
        place = bisect_left(self.ids, worker)
        ids = (*self.ids[:place], worker, *self.ids[place:])
        guests = self.guests if takes_part else {**self.guests, worker: frozenset[str]()}
        return Members.__new__(Members)._become(
            self.epoch + 1, ids, self.finished, self.departed, guests, self.admitted
        )

    def admitting(self, worker: int, channel: str) -> Members:
        """Return the members of the next epoch, when the guest `worker` takes part in `channel` from now on."""
        guests = {**self.guests, worker: self.guests[worker] | {channel}}
        admitted = {**self.admitted, channel: (*self.admitted.get(channel, ()), worker)}
        return Members.__new__(Members)._become(
            self.epoch + 1, self.ids, self.finished, self.departed, guests, admitted
        )

    def party(self, channel: str = "", group: tuple[int, ...] = ()) -> Members:
        """Return who takes part in a channel's rounds (of `group` alone, if given), in the party's own epoch.

        That counts the departures and the channel's admissions (of the group): what changes nothing here is none.
        """
        if not (group or self.guests or self.admitted) and len(self.departed) in (0, self.epoch):
            return self  # nobody has ever come
        known = self._parties.get((channel, group))
        if known is not None:
            return known
        there = [worker for worker in self.ids if worker not in self.guests or channel in self.guests[worker]]
        changes = (*self.departed, *self.admitted.get(channel, ()))
        if group:
            there = [worker for worker in there if worker in group]
            changes = tuple(worker for worker in changes if worker in group)
        party = self._parties[channel, group] = Members(len(changes), tuple(there), self.finished, self.departed)
        return party

    def plain(self) -> list[Any]:
        """Return plain values that `of` understands."""
        guests = [[worker, sorted(channels)] for worker, channels in self.guests.items()]
        admitted = [[channel, list(workers)] for channel, workers in self.admitted.items()]
        return [self.epoch, list(self.ids), list(self.finished), list(self.departed), guests, admitted]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> Members:
        """Return the members that returned these `plain` values."""
        epoch, ids, finished, departed, guests, admitted = plain
        return cls(
            epoch,
            tuple(ids),
            tuple(finished),
            tuple(departed),
            {worker: frozenset(channels) for worker, channels in guests},
            {channel: tuple(workers) for channel, workers in admitted},
        )

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


@functools.lru_cache(maxsize=8)
def cohort_of(workers: int) -> Members:
    """Return the workers 0 to `workers` - 1 before anybody has come or gone.

    One object for equal numbers: what one run has left in a cache, the next one finds without comparing everybody.
    """
    return Members(0, tuple(range(workers)))


@dataclass(frozen=True, slots=True)
class Ballot:
    """A worker's vote on its attempt at a round: the digest of what it staged, None if it could not.

    `group` are the workers whose round it is, as they were when the run began; empty: all. `epoch` is the group's.
    """

    worker: int
    channel: str
    round: int
    epoch: int
    digest: int | None
    group: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What a round came to; `members` contributed, or (outcome "again") are to try next.

    `now` are the members of the run at the decision: whoever is told of it knows at least these before the next round
    of the channel, so all take the same guests into it.
    """

    outcome: Outcome
    members: Members
    now: Members


class _Key(NamedTuple):
    """Names a round. Groups have rounds of their own, though their channels may have the same name."""

    group: tuple[int, ...]
    channel: str
    round: int


@dataclass(slots=True)
class _Attempt:
    members: Members
    votes: dict[int, Callable[[Decision], None]] = field(default_factory=dict)
    digests: set[int | None] = field(default_factory=set)

    @property
    def has_failed(self) -> bool:
        return None in self.digests or len(self.digests) > 1


@dataclass(slots=True)
class _Round:
    began_with: set[int] = field(default_factory=set)  # members of its attempts so far
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    guests: dict[int, Callable[[Decision], None]] = field(default_factory=dict)  # who will take part in the next one


class _Change(NamedTuple):
    """One entry of the roster's log: `worker` left (`channel` None) or was admitted to `channel`.

    `channels`: those in whose rounds it had taken part when it left; None: in all.
    """

    worker: int
    channel: str | None
    channels: frozenset[str] | None = None


Entry = Sequence[Any]
"""What has happened to a roster: its name, then plain values."""


class Roster:
    """Membership and decisions of one run. `on_change(members)` is called after every change.

    Of the cohort `workers` those in `absent` have not come yet. `on_entry` is told what `replay` needs.
    """

    def __init__(
        self,
        workers: tuple[int, ...],
        on_change: Callable[[Members], None],
        absent: Collection[int] = (),
        on_entry: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self.members = Members(0, tuple(worker for worker in workers if worker not in absent))
        self._log: list[_Change] = []
        self._on_change, self._on_entry = on_change, on_entry
        self._doubtful: set[int] = set()
        self._open: dict[_Key, _Round] = {}
        self._decided: OrderedDict[_Key, Decision] = OrderedDict()

    def replay(self, entries: Iterable[Entry]) -> None:
        """Be what a roster has become that began like this one and told these entries."""
        on_change, self._on_change = self._on_change, lambda members: None
        on_entry, self._on_entry = self._on_entry, lambda entry: None
        for entry in entries:
            self._repeat(entry)
        self._on_change, self._on_entry = on_change, on_entry

    def state(self) -> dict[str, Any]:
        """Return plain values that `restore` understands. Like entries, they say nothing of votes on open rounds."""
        pool = _Pool()
        decided = [
            (key, decision.outcome, pool.place(decision.members), pool.place(decision.now))
            for key, decision in self._decided.items()
        ]
        attempts = [
            (key, epoch, attempt.has_failed)
            for key, round_ in self._open.items()
            for epoch, attempt in round_.attempts.items()
        ]
        return {
            "members": self.members.plain(),
            "log": [
                (worker, channel, None if channels is None else sorted(channels))
                for worker, channel, channels in self._log
            ],
            "doubtful": sorted(self._doubtful),
            "pool": pool.rows,
            "decided": decided,
            "attempts": attempts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be the roster that returned this `state`, of the same cohort, before anything happens."""
        self.members = Members.of(state["members"])
        self._log = [
            _Change(worker, channel, None if channels is None else frozenset(channels))
            for worker, channel, channels in state["log"]
        ]
        self._doubtful = set(state["doubtful"])
        pool = [_earlier(self.members, row) for row in state["pool"]]
        for key, outcome, members, now in state["decided"]:
            self._decided[_key(key)] = Decision(outcome, pool[members], pool[now])
        for key, epoch, has_failed in state["attempts"]:
            self._repeat(("again" if has_failed else "begun", key, epoch))

    def remove(self, worker: int, finished: bool = False, suspected: bool = False) -> None:
        """The worker is dead, or has finished, or is `suspected` to be dead. Completes attempts that waited for it.

        Of one that is no member already it may still be learned that it is dead for sure.
        """
        if worker not in self.members:
            if not suspected and worker in self._doubtful:
                self._on_entry(("remove", worker, finished, False))
                self._doubtful.discard(worker)
            return
        for key, round_ in self._open.items():
            for epoch in round_.attempts:  # it has begun with the worker, whose vote nobody will hand in again
                self._on_entry(("begun", key, epoch))
        self._on_entry(("remove", worker, finished, suspected))
        if suspected:
            self._doubtful.add(worker)
        self._log.append(_Change(worker, None, self.members.guests.get(worker)))
        self._become(self.members.without(worker, finished))
        for key, round_ in list(self._open.items()):
            answers = [round_.guests.pop(worker, None)]
            answers += [attempt.votes.pop(worker, None) for attempt in round_.attempts.values()]
            for answer in answers:
                if answer is not None:
                    answer(self._skipped(key))
            for epoch in list(round_.attempts):
                self._settle(key, epoch)

    def join(self, worker: int, alone: bool = False) -> None:
        """The worker has come, or come back, as a guest; or takes part at once, `alone` in what it does.

        Raises `ValueError` if it is a member.
        """
        if worker in self.members:
            raise ValueError(f"worker {worker} is in the run")
        self._on_entry(("join", worker, alone))
        self._doubtful.discard(worker)
        self._become(self.members.with_guest(worker, takes_part=alone))

    def admit(self, worker: int, channel: str = "") -> None:
        """The guest takes part in the channel from its next round on; "": in what needs no vote. Nothing if it does."""
        if channel not in self.members.guests.get(worker, {channel}):
            self._on_entry(("admit", worker, channel))
            self._admit(worker, channel)

    def vote(self, ballot: Ballot, answer: Callable[[Decision], None]) -> None:
        """Take a vote; `answer` is called once, now or when the attempt is complete.

        A vote of somebody who is no member any more, or stops being one before there is an answer, is answered
        "skipped": it has been declared dead. A repeated vote takes the place of the first. A guest's vote does not
        count; if it comes before the round is decided, the guest takes part in the next one, and in what needs no vote.
        To the channel "" a guest is admitted at once.
        """
        key = _Key(ballot.group, ballot.channel, ballot.round)
        party = self.members.party(key.channel, key.group)
        outsider = ballot.worker not in self.members or (key.group and ballot.worker not in key.group)
        if outsider or not 0 <= ballot.epoch <= party.epoch:
            answer(self._skipped(key))
        elif not key.channel:
            self.admit(ballot.worker)
            answer(Decision("committed", self.members.party(), self.members))
        elif key in self._decided:
            answer(self._decided[key])
        elif ballot.worker in party:
            attempt = self._attempt(key, ballot.epoch)
            attempt.votes[ballot.worker] = answer
            attempt.digests.add(ballot.digest)
            self._settle(key, ballot.epoch)
        else:
            self._round(key).guests[ballot.worker] = answer

    def _become(self, members: Members) -> None:
        self.members = members
        self._on_change(members)

    def _admit(self, worker: int, channel: str) -> None:
        if channel not in self.members.guests.get(worker, {channel}):
            self._log.append(_Change(worker, channel))
            self._become(self.members.admitting(worker, channel))

    def _skipped(self, key: _Key) -> Decision:
        return Decision("skipped", self.members.party(key.channel, key.group), self.members)

    def _round(self, key: _Key) -> _Round:
        round_ = self._open.get(key)
        if round_ is None:
            round_ = self._open[key] = _Round()
        return round_

    def _attempt(self, key: _Key, epoch: int) -> _Attempt:
        """Return the attempt at a round by the party of `epoch`, begun now if need be."""
        round_ = self._round(key)
        if epoch not in round_.attempts:
            party = self._party_at(epoch, key)
            round_.attempts[epoch] = _Attempt(party)
            round_.began_with.update(party)
        return round_.attempts[epoch]

    def _party_at(self, epoch: int, key: _Key) -> Members:
        """Return who took part in the channel at that epoch of its party, by undoing what has happened since."""
        party = self.members.party(key.channel, key.group)
        ids = set(party)
        since = party.epoch - epoch
        for change in reversed(self._log):
            if not since:
                break
            if change.channel not in (None, key.channel) or (key.group and change.worker not in key.group):
                continue
            since -= 1
            if change.channel is not None:
                ids.discard(change.worker)
            elif change.channels is None or key.channel in change.channels:
                ids.add(change.worker)
        return party if epoch == party.epoch else Members(epoch, tuple(ids), party.finished, party.departed)

    def _settle(self, key: _Key, epoch: int) -> None:
        round_ = self._open.get(key)
        if round_ is None or epoch not in round_.attempts:
            return
        attempt, newest = round_.attempts[epoch], self.members.party(key.channel, key.group)
        if attempt.has_failed and epoch < newest.epoch:
            self._on_entry(("again", key, epoch))
            self._answer(attempt, Decision("again", newest, self.members))  # its digests stay for late votes
        elif attempt.has_failed:
            self._decide(key, "skipped", attempt.members)
        elif self._complete(attempt, newest):
            whole = round_.began_with <= set(attempt.members)
            outcome: Outcome = "committed" if whole else "degraded"
            self._decide(key, outcome if self._has_quorum(key, attempt) else "skipped", attempt.members)

    def _has_quorum(self, key: _Key, attempt: _Attempt) -> bool:
        """Whether more took part than may still be alive where we cannot hear them."""
        doubtful = [worker for worker in self._doubtful if not key.group or worker in key.group]
        return len(doubtful) < len(attempt.votes)

    def _complete(self, attempt: _Attempt, newest: Members) -> bool:
        changed_since = newest.epoch - attempt.members.epoch
        if len(attempt.votes) < len(attempt.members) - changed_since:
            return False  # found without a look at every member: each of them asks this at its vote
        return all(worker in attempt.votes for worker in attempt.members if worker in newest)

    def _decide(self, key: _Key, outcome: Outcome, members: Members) -> None:
        round_ = self._open.pop(key)
        guests = sorted(round_.guests)
        self._on_entry(("decide", key, outcome, members.epoch, members.ids, guests))
        decision = self._keep(key, outcome, members, guests)
        for attempt in round_.attempts.values():
            self._answer(attempt, decision)
        for answer in round_.guests.values():
            answer(decision)

    def _keep(self, key: _Key, outcome: Outcome, members: Members, guests: Sequence[int]) -> Decision:
        for guest in guests:
            self._admit(guest, key.channel)
            self._admit(guest, "")
        decision = self._decided[key] = Decision(outcome, members, self.members)
        while len(self._decided) > DECISIONS_KEPT:
            self._decided.popitem(last=False)
        return decision

    def _answer(self, attempt: _Attempt, decision: Decision) -> None:
        votes, attempt.votes = attempt.votes, {}
        for worker in sorted(votes):
            votes[worker](decision)

    def _repeat(self, entry: Entry) -> None:
        match entry:
            case ("join", worker, alone):
                self.join(worker, alone)
            case ("remove", worker, finished, suspected):
                self.remove(worker, finished, suspected)
            case ("admit", worker, channel):
                self._admit(worker, channel)
            case ("begun", key, epoch):
                self._attempt(_key(key), epoch)
            case ("again", key, epoch):
                self._attempt(_key(key), epoch).digests.add(None)
            case ("decide", key, outcome, epoch, ids, guests):
                self._open.pop(_key(key), None)
                members = Members(epoch, tuple(ids), self.members.finished, self.members.departed)
                self._keep(_key(key), outcome, members, guests)
            case _:
                raise ValueError(f"a roster has no entry such as {entry!r}")


class _Pool:
    """Members as rows of plain values, each row once: a thousand decisions have few different ones.

    Who has finished, departed or been admitted only ever becomes more, so of the newest members' lists a row has but
    the lengths: a run of days has long ones.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[Any, ...], int] = {}

    @property
    def rows(self) -> list[Any]:
        return list(self._places)

    def place(self, members: Members) -> int:
        """Return the index of the members' row."""
        guests = tuple((worker, tuple(sorted(channels))) for worker, channels in members.guests.items())
        admitted = tuple((channel, len(workers)) for channel, workers in members.admitted.items())
        row = members.epoch, members.ids, len(members.finished), len(members.departed), guests, admitted
        return self._places.setdefault(row, len(self._places))


def _earlier(newest: Members, row: Sequence[Any]) -> Members:
    """Return the members of that row of a `_Pool`."""
    epoch, ids, finished, departed, guests, admitted = row
    return Members(
        epoch,
        tuple(ids),
        newest.finished[:finished],
        newest.departed[:departed],
        {worker: frozenset(channels) for worker, channels in guests},
        {channel: newest.admitted[channel][:count] for channel, count in admitted},
    )


def _key(values: Sequence[Any]) -> _Key:
    group, channel, round_ = values
    return _Key(tuple(group), channel, round_)
