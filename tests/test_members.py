"""The roster: its table of states row by row, and its promises under random interleavings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from decentral.members import DECISIONS_KEPT, Ballot, Decision, Members, Roster


class Clerk:
    """A roster, and what it has answered to whom."""

    def __init__(self, *workers: int) -> None:
        self.changes: list[tuple[Members, int]] = []
        self.roster = Roster(tuple(workers), self._changed)
        self.answers: list[tuple[int, str, tuple[int, ...]]] = []

    def _changed(self, members: Members, gone: int = -1) -> None:
        self.changes.append((members, gone))

    def vote(self, worker: int, digest: int | None, *, epoch: int = 0, round_: int = 1, channel: str = "sync") -> None:
        def answer(decision: Decision) -> None:
            self.answers.append((worker, decision.outcome, decision.members.ids))

        self.roster.vote(Ballot(worker, channel, round_, epoch, digest), answer)

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


def test_the_death_of_the_last_missing_voter_completes_the_round() -> None:
    clerk = Clerk(0, 1, 2, 3)
    for worker in (0, 1, 3):
        clerk.vote(worker, 7)
    assert clerk.news() == []
    clerk.roster.remove(2)
    assert [answer[1:] for answer in clerk.news()] == [("committed", (0, 1, 2, 3))] * 3


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
    assert [members for members, _ in clerk.changes] == [Members(1, (0, 2))]
    assert clerk.roster.members == Members(1, (0, 2))


def test_the_last_survivor_decides_alone() -> None:
    clerk = Clerk(0, 1, 2)
    clerk.roster.remove(0)
    clerk.roster.remove(2)
    clerk.vote(1, 7, epoch=2)
    assert clerk.news() == [(1, "committed", (1,))]


def test_an_answer_may_vote_again_at_once() -> None:
    """The roster may be called back from an answer: nobody is answered twice, nobody is forgotten."""
    roster = Roster((0, 1, 2), lambda *_news: None)
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
        self.roster = Roster(tuple(range(self.chance.randint(2, 6))), lambda *_news: None)
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
