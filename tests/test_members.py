"""The roster: its table of states row by row, and its promises under random interleavings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from decentral.members import DECISIONS_KEPT, Ballot, Decision, Members, Roster, _Key


class Clerk:
    """A roster, and what it has answered to whom."""

    def __init__(self, *workers: int) -> None:
        self.changes: list[Members] = []
        self.roster = Roster(tuple(workers), self.changes.append)
        self.answers: list[tuple[int, str, tuple[int, ...]]] = []

    def vote(
        self,
        worker: int,
        digest: int | None,
        *,
        epoch: int = 0,
        round_: int = 1,
        channel: str = "sync",
        group: tuple[int, ...] = (),
    ) -> None:
        def answer(decision: Decision) -> None:
            self.answers.append((worker, decision.outcome, decision.members.ids))

        self.roster.vote(Ballot(worker, channel, round_, epoch, digest, group), answer)

    def news(self) -> list[tuple[int, str, tuple[int, ...]]]:
        """Return the answers since the last look, in ascending order of workers."""
        news, self.answers = sorted(self.answers), []
        return news


# -- the table in the docstring, row by row ---------------------------------------------------------------------------


def test_all_voted_equal_digests_is_committed() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(2, 7)
    clerk.vote(0, 7)
    assert clerk.news() == []
    clerk.vote(1, 7)
    assert clerk.news() == [(worker, "committed", (0, 1, 2)) for worker in (0, 1, 2)]


def test_committed_though_a_member_died_after_it_had_contributed() -> None:
    """All staged the whole result, the dead member's part included; only its vote is missing."""
    clerk = Clerk(0, 1, 2)
    clerk.vote(0, 7)
    clerk.vote(1, 7)
    assert clerk.news() == []
    clerk.roster.remove(2)
    assert clerk.news() == [(0, "committed", (0, 1, 2)), (1, "committed", (0, 1, 2))]


def test_a_second_attempt_of_the_survivors_is_degraded() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(0, 7)
    clerk.roster.remove(2)
    clerk.vote(1, None)
    assert clerk.news() == [(0, "again", (0, 1)), (1, "again", (0, 1))]
    clerk.vote(0, 5, epoch=1)
    clerk.vote(1, 5, epoch=1)
    assert clerk.news() == [(0, "degraded", (0, 1)), (1, "degraded", (0, 1))]


def test_a_missing_result_without_a_death_is_skipped_at_once() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(0, 7)
    clerk.vote(1, None)
    assert clerk.news() == [(0, "skipped", (0, 1, 2)), (1, "skipped", (0, 1, 2))]


def test_different_digests_without_a_death_are_skipped() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(0, 7)
    clerk.vote(1, 8)
    assert [outcome for _, outcome, _ in clerk.news()] == ["skipped", "skipped"]


def test_different_digests_after_a_death_are_tried_again() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.roster.remove(2)
    clerk.vote(0, 7)
    clerk.vote(1, 8)
    assert clerk.news() == [(0, "again", (0, 1)), (1, "again", (0, 1))]


def test_a_failed_second_attempt_is_skipped() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.roster.remove(2)
    clerk.vote(0, None)
    clerk.vote(1, None, epoch=1)
    assert clerk.news() == [(0, "again", (0, 1)), (1, "skipped", (0, 1))]
    clerk.vote(0, 5, epoch=1)
    assert clerk.news() == [(0, "skipped", (0, 1))]


def test_a_death_in_the_second_attempt_leads_to_a_third() -> None:
    clerk = Clerk(0, 1, 2, 3)
    clerk.roster.remove(3)
    for worker in (0, 1, 2):
        clerk.vote(worker, None)
    assert [answer[1:] for answer in clerk.news()] == [("again", (0, 1, 2))] * 3
    clerk.roster.remove(2)
    clerk.vote(0, None, epoch=1)
    clerk.vote(1, None, epoch=1)
    assert [answer[1:] for answer in clerk.news()] == [("again", (0, 1))] * 2
    clerk.vote(0, 5, epoch=2)
    clerk.vote(1, 5, epoch=2)
    assert [answer[1:] for answer in clerk.news()] == [("degraded", (0, 1))] * 2


def test_otherwise_the_voters_wait() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(0, 7)
    clerk.vote(2, 7)
    assert clerk.news() == []
    clerk.vote(1, 7, round_=2)  # another round, another channel: nothing to do with it
    clerk.vote(1, 7, channel="other")
    assert clerk.news() == []


# -- who is late, dead or repeats itself ------------------------------------------------------------------------------


def test_a_late_voter_of_a_decided_round_is_told_the_decision() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(0, None)
    clerk.news()
    clerk.vote(1, 7)
    clerk.vote(2, 8)
    assert clerk.news() == [(1, "skipped", (0, 1, 2)), (2, "skipped", (0, 1, 2))]


def test_a_late_voter_of_a_failed_attempt_is_sent_into_the_next_one() -> None:
    """Worker 2 staged a result before it heard of the death; the others are waiting for it in the second attempt."""
    clerk = Clerk(0, 1, 2, 3)
    clerk.roster.remove(3)
    clerk.vote(0, None)
    clerk.vote(1, None)
    clerk.news()
    clerk.vote(2, 7)
    assert clerk.news() == [(2, "again", (0, 1, 2))]
    for worker in (0, 1, 2):
        clerk.vote(worker, 5, epoch=1)
    assert clerk.news() == [(worker, "degraded", (0, 1, 2)) for worker in (0, 1, 2)]


def test_the_vote_of_the_dead_is_skipped_and_decides_nothing() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.roster.remove(2)
    clerk.vote(2, 9)
    assert clerk.news() == [(2, "skipped", (0, 1))]
    clerk.vote(0, 7, epoch=1)
    clerk.vote(1, 7, epoch=1)
    assert clerk.news() == [(0, "committed", (0, 1)), (1, "committed", (0, 1))]


def test_who_waits_for_an_answer_when_it_is_declared_dead_gets_one() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(2, 7)
    clerk.roster.remove(2)
    assert clerk.news() == [(2, "skipped", (0, 1))]
    clerk.vote(0, 7)
    clerk.vote(1, 7)
    assert clerk.news() == [(0, "committed", (0, 1, 2)), (1, "committed", (0, 1, 2))]


def test_the_digest_of_the_dead_still_counts_as_a_difference() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.vote(2, 8)
    clerk.roster.remove(2)
    clerk.vote(0, 7)
    assert (0, "again", (0, 1)) in clerk.news()


def test_a_repeated_vote_takes_the_place_of_the_first() -> None:
    clerk = Clerk(0, 1)
    clerk.vote(0, 7)
    clerk.vote(0, 7)
    clerk.vote(1, 7)
    assert clerk.news() == [(0, "committed", (0, 1)), (1, "committed", (0, 1))]
    clerk.vote(0, 7)
    assert clerk.news() == [(0, "committed", (0, 1))]


@pytest.mark.parametrize("epoch", [-1, 1, 99])
def test_a_vote_from_an_epoch_that_never_was_is_skipped_alone(epoch: int) -> None:
    clerk = Clerk(0, 1)
    clerk.vote(0, 7, epoch=epoch)
    assert clerk.news() == [(0, "skipped", (0, 1))]
    clerk.vote(0, 7)
    clerk.vote(1, 7)
    assert [outcome for _, outcome, _ in clerk.news()] == ["committed", "committed"]


def test_removing_twice_or_a_stranger_changes_nothing() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.roster.remove(1)
    clerk.roster.remove(1)
    clerk.roster.remove(17)
    assert clerk.changes == [Members(1, (0, 2))]
    assert clerk.roster.members == Members(1, (0, 2))


def test_the_last_survivor_decides_alone() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.roster.remove(0)
    clerk.roster.remove(2)
    clerk.vote(1, 7, epoch=2)
    assert clerk.news() == [(1, "committed", (1,))]


def test_an_answer_may_vote_again_at_once() -> None:
    """The roster may be called back from an answer: nobody is answered twice, nobody is forgotten."""
    roster = Roster((0, 1, 2), lambda _members: None)
    heard: list[tuple[int, str]] = []

    def voter(worker: int) -> Callable[[Decision], None]:
        def answer(decision: Decision) -> None:
            heard.append((worker, decision.outcome))
            if decision.outcome == "again":
                roster.vote(Ballot(worker, "sync", 1, decision.members.epoch, 5), answer)

        return answer

    roster.remove(2)
    roster.vote(Ballot(0, "sync", 1, 0, 7), voter(0))
    roster.vote(Ballot(1, "sync", 1, 0, None), voter(1))
    assert sorted(heard) == [(0, "again"), (0, "degraded"), (1, "again"), (1, "degraded")]


def test_decisions_are_kept_for_a_while() -> None:
    clerk = Clerk(0, 1)
    for round_ in range(1, DECISIONS_KEPT + 1):
        clerk.vote(0, None, round_=round_)
    clerk.news()
    clerk.vote(1, 7, round_=1)
    assert clerk.news() == [(1, "skipped", (0, 1))]


# -- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_decides_alone_and_another_one_by_itself() -> None:
    clerk = Clerk(0, 1, 2, 3, 4)
    clerk.vote(3, 8, group=(3, 4))
    clerk.vote(0, 7, group=(0, 1))
    clerk.vote(1, 7, group=(0, 1))
    assert clerk.news() == [(0, "committed", (0, 1)), (1, "committed", (0, 1))]
    clerk.vote(4, None, group=(3, 4))
    assert clerk.news() == [(3, "skipped", (3, 4)), (4, "skipped", (3, 4))]
    clerk.vote(2, 7, group=(0, 1))
    assert clerk.news() == [(2, "skipped", (0, 1))]  # none of its business


def test_a_group_does_not_notice_a_death_elsewhere() -> None:
    clerk = Clerk(0, 1, 2, 3)
    clerk.roster.remove(3)
    clerk.vote(0, None, group=(0, 1))
    assert clerk.news() == [(0, "skipped", (0, 1))]  # no death of its own is the reason: there is no second attempt
    clerk.vote(2, 7, group=(2, 3))
    clerk.roster.remove(1)
    assert clerk.news() == [(2, "committed", (2, 3))]


def test_members_within_a_group_count_its_own_departures() -> None:
    members = Members(0, (0, 1, 2, 3)).without(3).without(0)
    assert members.party("sync", (0, 1, 2)) == Members(1, (1, 2))
    assert members.party("sync", (1, 2)) == Members(0, (1, 2))
    assert members.party("sync") is members


@pytest.mark.parametrize("seed", range(60))
def test_a_group_in_a_larger_run_is_answered_as_a_run_of_its_own(seed: int) -> None:
    chance = random.Random(seed)
    group = tuple(sorted(chance.sample(range(8), 4)))
    larger, own = Clerk(*range(8)), Clerk(*group)
    for _ in range(60):
        if chance.random() < 0.15:
            worker = chance.randrange(8)
            larger.roster.remove(worker)
            own.roster.remove(worker)
        else:
            worker, round_ = chance.choice(group), chance.randint(1, 4)
            epoch = chance.randint(0, own.roster.members.epoch)
            digest = chance.choice([None, 7, 7, 7, 7, 8])
            larger.vote(worker, digest, epoch=epoch, round_=round_, group=group)
            own.vote(worker, digest, epoch=epoch, round_=round_)
        assert larger.answers == own.answers


# -- any order --------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker that goes through rounds as `protocols.rounds.Round` does, with a view of the members that may lag."""

    id: int
    epoch: int = 0
    round: int = 1
    contributes: bool = False
    waits: bool = False
    votes: int = 0
    answers: int = 0
    learned: dict[int, Decision] = field(default_factory=dict)


class Crowd:
    """Workers and a roster that take one random step after the other."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.roster = Roster(tuple(range(self.chance.randint(2, 6))), lambda _members: None)
        self.workers = [Worker(worker) for worker in self.roster.members]
        self.members_at = {0: self.roster.members}
        self.contributed: dict[tuple[int, int], set[int]] = {}  # by (round, epoch)
        self.ballots: dict[tuple[int, int], dict[int, int | None]] = {}
        self.alive_at_decision: dict[int, frozenset[int]] = {}

    def step(self, last_round: int) -> bool:
        """Let one thing happen; False when no live worker has anything left to do."""
        ready = [worker for worker in self.workers if not worker.waits and worker.round <= last_round]
        live = [worker for worker in ready if worker.id in self.roster.members]
        move = self.chance.random()
        if not live:
            return False
        if move < 0.04 and len(self.roster.members) > 1:
            self.roster.remove(self.chance.choice(self.roster.members.ids))
            self.members_at[self.roster.members.epoch] = self.roster.members
        elif move < 0.1:
            worker = self.chance.choice(live)
            if not worker.contributes:  # an attempt goes on with the members it began with
                worker.epoch = self.roster.members.epoch
        else:
            self.act(self.chance.choice(ready if move > 0.97 else live))  # the dead may speak, too
        return True

    def act(self, worker: Worker) -> None:
        """Begin an attempt, or end it: with a result only if everybody contributed, and not always then."""
        attempt = worker.round, worker.epoch
        if not worker.contributes:
            worker.contributes = True
            self.contributed.setdefault(attempt, set()).add(worker.id)
            return
        whole = self.contributed[attempt] == set(self.members_at[worker.epoch])
        if not whole and self.chance.random() < 0.8 and self.roster.members.epoch == worker.epoch:
            return  # it waits on
        digest = None
        if whole and self.chance.random() < 0.9:
            digest = 666 if self.chance.random() < 0.03 else 10 + worker.epoch
        self.ballots.setdefault(attempt, {})[worker.id] = digest
        worker.contributes, worker.waits, worker.votes = False, True, worker.votes + 1
        self.roster.vote(
            Ballot(worker.id, "sync", *attempt, digest), lambda decision: self.answer(worker, *attempt, decision)
        )

    def answer(self, worker: Worker, round_: int, epoch: int, decision: Decision) -> None:
        assert worker.waits
        worker.waits, worker.answers = False, worker.answers + 1
        if worker.id not in self.roster.members:
            assert decision.outcome == "skipped"
        elif decision.outcome == "again":
            assert decision.members == self.roster.members
            assert decision.members.epoch > epoch
            worker.epoch = decision.members.epoch
        else:
            self.alive_at_decision.setdefault(round_, frozenset(self.roster.members))
            worker.learned[round_] = decision
            worker.round, worker.epoch = round_ + 1, max(epoch, decision.members.epoch)


@pytest.mark.parametrize("seed", range(120))
def test_any_interleaving_keeps_the_promises(seed: int) -> None:
    crowd = Crowd(seed)
    for _ in range(100_000):
        if not crowd.step(last_round=5):
            break
    live = [worker for worker in crowd.workers if worker.id in crowd.roster.members]
    assert all(worker.round == 6 for worker in live)
    assert all(worker.votes == worker.answers for worker in crowd.workers)
    for round_, alive in crowd.alive_at_decision.items():
        (decision,) = {worker.learned[round_] for worker in crowd.workers if round_ in worker.learned}
        assert decision.members == crowd.members_at[decision.members.epoch]
        if decision.outcome != "skipped":
            ballots = crowd.ballots[round_, decision.members.epoch]
            assert alive <= set(ballots)
            assert None not in ballots.values()
            assert len(set(ballots.values())) == 1


def test_the_interleavings_reach_every_outcome() -> None:
    reached: dict[str, int] = {}
    for seed in range(120):
        crowd = Crowd(seed)
        while crowd.step(last_round=5):
            pass
        for decision in {(round_, d) for worker in crowd.workers for round_, d in worker.learned.items()}:
            reached[decision[1].outcome] = reached.get(decision[1].outcome, 0) + 1
    assert set(reached) == {"committed", "degraded", "skipped"}
    assert min(reached.values()) >= 10


def test_members_know_ranks_and_epochs() -> None:
    members = Members(0, (5, 1, 9))
    assert (members.ids, len(members), list(members)) == ((1, 5, 9), 3, [1, 5, 9])
    assert [members.rank(worker) for worker in (1, 5, 9)] == [0, 1, 2]
    assert (5 in members, 4 in members) == (True, False)
    fewer = members.without(5)
    assert fewer == Members(1, (1, 9))
    assert fewer.rank(9) == 1
    assert 5 not in fewer
    assert members.without(4) == Members(1, (1, 5, 9))
    assert hash(Members(1, (1, 9))) == hash(fewer)
    assert Members(2, (1, 9)) != fewer
    with pytest.raises(KeyError):
        fewer.rank(5)


# Guests.


def test_a_guests_vote_does_not_count_and_lets_it_into_the_next_round() -> None:
    clerk = Clerk(0, 1)
    clerk.roster.join(2)
    clerk.vote(0, 7)
    clerk.vote(2, None)
    assert clerk.news() == []
    clerk.vote(1, 7)
    assert sorted(clerk.news()) == [(0, "committed", (0, 1)), (1, "committed", (0, 1)), (2, "committed", (0, 1))]
    assert clerk.roster.members.party("sync") == Members(1, (0, 1, 2))
    for worker in (0, 1, 2):
        clerk.vote(worker, 8, round_=2, epoch=1)
    assert {answer[1:] for answer in clerk.news()} == {("committed", (0, 1, 2))}


def test_a_guest_that_votes_too_late_is_told_and_waits_for_the_next_round() -> None:
    clerk = Clerk(0, 1)
    clerk.roster.join(2)
    clerk.vote(0, 7)
    clerk.vote(1, 7)
    clerk.news()
    clerk.vote(2, None)
    assert clerk.news() == [(2, "committed", (0, 1))]
    assert clerk.roster.members.party("sync") == Members(0, (0, 1))


def test_whoever_is_told_of_a_decision_knows_the_guests_of_the_next_round() -> None:
    told: list[Members] = []
    roster = Roster((0, 1), lambda _members: None, absent=())
    roster.join(2)
    for worker in (2, 0, 1):
        roster.vote(Ballot(worker, "sync", 1, 0, 7), lambda decision: told.append(decision.now.party("sync")))
    assert told == [Members(1, (0, 1, 2))] * 3


def test_channels_admit_by_themselves_and_what_needs_no_vote_with_the_first() -> None:
    clerk = Clerk(0, 1)
    clerk.roster.join(2)
    assert clerk.roster.members.party().ids == (0, 1)
    clerk.vote(2, None, channel="a")
    clerk.vote(0, 7, channel="a")
    clerk.vote(1, 7, channel="a")
    members = clerk.roster.members
    assert [members.party(channel).ids for channel in ("a", "b", "")] == [(0, 1, 2), (0, 1), (0, 1, 2)]
    assert members.party("b").epoch == 0  # nothing has changed there


def test_a_guest_is_admitted_at_once_to_what_needs_no_vote() -> None:
    clerk = Clerk(0, 1)
    clerk.roster.join(2)
    clerk.vote(2, None, channel="", round_=0)
    assert clerk.news() == [(2, "committed", (0, 1, 2))]
    assert clerk.roster.members.party("sync").ids == (0, 1)


def test_a_guest_that_dies_was_never_there_for_the_others() -> None:
    clerk = Clerk(0, 1)
    clerk.roster.join(2)
    clerk.vote(2, None)
    clerk.vote(0, 7)
    clerk.roster.remove(2)
    assert clerk.news() == [(2, "skipped", (0, 1))]
    clerk.vote(1, 7)  # begun before the guest died: the party is the same, its epoch is not
    clerk.vote(0, 7, epoch=1)
    clerk.vote(1, 7, epoch=1)
    assert (1, "committed", (0, 1)) in clerk.news()


def test_who_is_there_cannot_come() -> None:
    clerk = Clerk(0, 1)
    with pytest.raises(ValueError, match="worker 1 is in the run"):
        clerk.roster.join(1)


@pytest.mark.parametrize("seed", range(40))
def test_parties_of_the_past_are_what_they_were(seed: int) -> None:
    """An attempt may be voted on in any epoch of its channel's party: each is found again by undoing the log."""
    chance = random.Random(seed)
    roster = Roster(tuple(range(6)), lambda _members: None, absent=(4, 5))
    channels = {"a": {0: (0, 1, 2, 3)}, "b": {0: (0, 1, 2, 3)}}
    for _ in range(30):
        worker, there = chance.randrange(6), roster.members
        if worker not in there:
            roster.join(worker)
        elif chance.random() < 0.5 and worker in there.guests:
            roster.admit(worker, chance.choice(["a", "b"]))
        elif len(there) > 1:
            roster.remove(worker)
        for channel, known in channels.items():
            party = roster.members.party(channel)
            assert known.setdefault(party.epoch, party.ids) == party.ids
    for channel, known in channels.items():
        for epoch, ids in known.items():
            assert roster._party_at(epoch, _Key((), channel, 1)).ids == ids


# -- a roster that goes on as another one -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_roster_made_from_the_state_of_another_answers_as_that_one(seed: int) -> None:
    """At any moment, once open votes have been handed in again: after doubts, failed attempts, deaths and guests."""
    chance = random.Random(seed)
    clerk, open_votes, round_ = Clerk(*range(4)), dict[int, tuple[int, int, int | None]](), 1
    for _ in range(60):
        roster = clerk.roster
        worker = chance.randrange(4)
        if chance.random() < 0.15:
            successor = Clerk(*range(4))
            successor.roster.restore(roster.state())
            for voter, (number, epoch, digest) in open_votes.items():
                successor.vote(voter, digest, round_=number, epoch=epoch)
            assert successor.news() == []
            assert successor.roster.state() == roster.state()
            assert votes_on(successor, open_votes, round_) == votes_on(clerk, open_votes, round_)
            return
        if worker not in roster.members:
            roster.join(worker)
        elif chance.random() < 0.2 and len(roster.members.party()) > 1:
            open_votes.pop(worker, None)
            roster.remove(worker, suspected=chance.random() < 0.5)
        elif worker not in open_votes:
            epoch = max(0, roster.members.party("sync").epoch - chance.randrange(2))  # some are late
            vote = round_, epoch, chance.choice((7, 7, 7, None))
            open_votes[worker] = vote
            clerk.vote(worker, vote[2], round_=vote[0], epoch=vote[1])
        for voter, outcome, _ in clerk.news():
            open_votes.pop(voter, None)
            round_ += outcome not in ("again",) and voter in roster.members


def votes_on(clerk: Clerk, open_votes: dict[int, tuple[int, int, int | None]], round_: int) -> object:
    """Have whoever has no open vote vote as well, also on what is decided; return what everybody is told."""
    members = clerk.roster.members
    for number in range(1, round_ + 1):
        for worker in members:
            if worker not in open_votes:
                clerk.vote(worker, 7, round_=number, epoch=members.party("sync").epoch)
    return clerk.news()
