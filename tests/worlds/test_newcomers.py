"""Workers that die and come back, over real sockets: they take over a state, and take part again."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest
import torch
from cluster import all_equal, cluster, outcomes, short
from sockets import KEYS, Died, train_here

from decentral.inner import SGD
from decentral.journal import Synced, Trained
from decentral.members import Ballot, Decision
from decentral.peer import Peer
from decentral.protocols import DDP, DiLoCo, Gossip, Int8, LocalSGD, NoLoCo, OuterSGD, SyncRule
from decentral.protocols.codecs import ErrorFeedback, TopK
from decentral.workers.coordinator import Coordinator
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.worker import Place, live

STEPS = 160
EQUAL: list[SyncRule] = [
    DDP(),
    DiLoCo(period=3, codec=Int8()),
    DiLoCo(period=3, codec=ErrorFeedback(codec=TopK()), all_reduce="gather"),
    LocalSGD(period=4),
]


class Mortal:
    """Has a worker die for good reason: at rest once it has done so many steps, or as it votes on its n-th round."""

    def __init__(self, peer: Peer, step: int | None, vote: int | None) -> None:
        self._peer, self._step, self._votes_left = peer, step, vote
        self._vote = peer.vote

    def rest(self) -> None:
        if self._step is not None and self._peer.step >= self._step:
            raise Died

    async def vote(self, ballot: Ballot) -> Decision:
        if self._votes_left is not None:
            self._votes_left -= 1
            if not self._votes_left:
                raise Died
        return await self._vote(ballot)


def mortal(rule: SyncRule, steps: dict[int, int], votes: dict[int, int]) -> SyncRule:
    """Return the rule under which these workers die once, after so many steps or votes."""
    base, died = type(rule), set[int]()

    class Dying(base):  # type: ignore[misc, valid-type]
        async def run(self, peer: Peer) -> None:
            if peer.id not in died and peer.id in (*steps, *votes):
                death = Mortal(peer, steps.get(peer.id), votes.get(peer.id))
                peer.keepers.append(death)
                peer.vote = death.vote  # type: ignore[method-assign]
                died.add(peer.id)
            await super().run(peer)

    return Dying(**{field: getattr(rule, field) for field in base.model_fields})  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", EQUAL, ids=short)
def test_who_is_back_ends_with_the_same_bits_as_everybody(rule: SyncRule) -> None:
    """One dies between rounds and one in the midst of a round; both come back and take part until the end."""
    run = cluster(mortal(rule, steps={1: 20}, votes={2: 12}), steps=STEPS, task={"name": "quadratic", "dimension": 64})
    outcome = train_here(run, lives=2)
    assert sorted(outcome.params) == [0, 1, 2, 3]
    assert all_equal(outcome)
    found = outcomes(outcome)
    assert all(len(said) == 1 for said in found)  # every round is one thing for all who were in it
    assert (found[-1].pop()[1], outcome.left()[-1].reason) == ((0, 1, 2, 3), "finished")
    late = [record for record in outcome.records if record.worker == 1 and isinstance(record, Trained)]
    assert sum(record.samples for record in late) < STEPS  # what it missed it did not train on


class LeavesAtRest:
    """Has a worker leave that was there before: at its first rest, and so once it takes part."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def rest(self) -> None:
        self._peer.leave()


def test_who_is_told_to_leave_after_it_came_back_does_not_come_again() -> None:
    lives = Counter[int]()

    class Leaving(DiLoCo):
        async def run(self, peer: Peer) -> None:
            lives[peer.id] += 1
            if peer.id == 1:
                peer.keepers.append(Mortal(peer, 20, None) if lives[1] == 1 else LeavesAtRest(peer))
            await super().run(peer)

    outcome = train_here(cluster(Leaving(period=3), steps=STEPS, task={"name": "quadratic", "dimension": 64}), lives=2)
    assert [left.reason for left in outcome.left() if left.worker == 1] == ["crashed", "preempted"]
    assert lives == {0: 1, 1: 2, 2: 1, 3: 1}
    assert all_equal(outcome)


@pytest.mark.parametrize("rule", [Gossip(period=3), NoLoCo(period=3)], ids=short)
def test_gossip_takes_them_in_at_once(rule: SyncRule) -> None:
    run = cluster(
        mortal(rule, steps={1: 20, 3: 50}, votes={}), steps=STEPS, task={"name": "quadratic", "dimension": 64}
    )
    outcome = train_here(run, lives=2)
    assert sorted(outcome.params) == [0, 1, 2, 3]
    assert all(torch.isfinite(params).all() for params in outcome.params.values())
    exchanged = [record for record in outcome.records if record.worker == 1 and isinstance(record, Synced)]
    assert any(record.outcome == "committed" for record in exchanged[-10:])


def test_the_state_is_given_in_the_midst_of_a_phase() -> None:
    """A phase takes two seconds. Who is back begins its first one before its host has ended the one under way."""
    task = {"name": "tests.chaos.tasks:Paced", "dimension": 64, "step_s": 0.01}
    outcome = train_here(cluster(mortal(Gossip(period=200), {1: 200}, {}), workers=2, steps=600, task=task), lives=2)
    back_s = next(record.time_s for record in outcome.left() if record.reason == "crashed")
    trained = [record for record in outcome.records if isinstance(record, Trained) and record.time_s > back_s]
    first = {worker: next(record for record in trained if record.worker == worker) for worker in (0, 1)}
    assert first[0].seconds > 2
    assert first[1].time_s - first[1].seconds < first[0].time_s - 1
    assert first[0].steps == first[1].steps == 200


@pytest.mark.parametrize("rule", [LocalSGD(period=4), DiLoCo(period=3, outer=OuterSGD(lr=1.0))], ids=short)
def test_every_sample_is_accounted_for(rule: SyncRule) -> None:
    """What the journal says is settled is in the model, and nothing else is; what was lost is trained on again."""
    run = cluster(mortal(rule, steps={1: 20}, votes={2: 6}), steps=STEPS, task={"name": "marks:Marks"})
    outcome = train_here(run.model_copy(update={"leases": True, "inner": SGD(lr=1.0), "norm_limit": 0.0}), lives=2)
    found = outcome.coverage()
    settled = set(range(found.samples)).difference(*[range(*missing) for missing in found.missing])
    assert settled == set(outcome.merged().nonzero().view(-1).tolist())
    assert found.repeated  # the phases that two workers died with


def test_who_is_taken_for_dead_under_a_rule_without_votes_finds_out_and_ends() -> None:
    async def main() -> None:
        coordinator = Coordinator(range(3), silence_s=math.inf)
        server = CoordinatorServer(coordinator, KEYS)
        address = await server.start("127.0.0.1", 0)
        place = Place(address, KEYS, "127.0.0.1", torch.device("cpu"))
        task = {"name": "tests.chaos.tasks:Paced", "step_s": 0.01}
        run = cluster(Gossip(period=3), workers=3, steps=10**6, task=task)
        lives = [asyncio.ensure_future(live(run, worker, 0, place)) for worker in range(3)]
        while not any(fields["kind"] == "synced" for fields in coordinator.poll(0)["records"]):
            await asyncio.sleep(0.01)
        await server.stop()
        coordinator.remove(1, 0, "stalled")  # while worker 1 cannot hear of it
        server = CoordinatorServer(coordinator, KEYS)
        await server.start("127.0.0.1", int(address.rpartition(":")[2]))
        _, reason = await asyncio.wait_for(lives[1], 60)
        assert reason == "worker 1 has been declared dead by the others"
        for each in lives:
            each.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await server.stop()

    asyncio.run(main())
