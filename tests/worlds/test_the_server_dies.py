"""Rules with a server, over real sockets: when the worker that hosts it dies, the next one takes over."""

from __future__ import annotations

import pytest
from cluster import all_equal, cluster, rounds, short
from sockets import Died, train_here
from tally import Tally
from torch import Tensor

from decentral.config import Run
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import AsyncLocalSGD, DynamicBackupWorkers, FedBuff, FedCompass
from decentral.protocols.server_rule import ServerRule
from decentral.replica import held_out

SERVED = [AsyncLocalSGD(period=2), FedBuff(period=2, buffer=2), FedCompass(period=4, ratio=2)]
SERVED += [DynamicBackupWorkers(period=2)]


def dying(rule: ServerRule, deaths: dict[int, int]) -> ServerRule:
    """Return the rule under which these workers die when they have done so many steps and are to do more."""
    base = type(rule)

    class Dying(base):  # type: ignore[misc, valid-type]
        async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
            if peer.step >= deaths.get(peer.id, peer.step + 1):
                raise Died
            update: Tensor | None = await super().work(peer, anchor, assigned)
            return update

    return Dying(**{field: getattr(rule, field) for field in base.model_fields})  # type: ignore[no-any-return]


def run_of(rule: ServerRule) -> Run:
    return cluster(rule, steps=16, speeds=(1, 0.8, 0.5, 0.9))


def assert_survived(outcome: Outcome, survivors: list[int], steps: int = 16) -> None:
    """Assert that these and no others did all their steps, and ended with the same model."""
    assert [(left.worker, left.step) for left in outcome.left() if left.reason == "finished"] == [
        (worker, steps) for worker in survivors
    ]
    assert sorted(outcome.params) == survivors
    assert all_equal(outcome)


@pytest.mark.parametrize("rule", SERVED, ids=short)
@pytest.mark.parametrize("at_step", [0, 8])
def test_the_next_one_takes_over(rule: ServerRule, at_step: int) -> None:
    """The host dies before anybody has pushed, or in the middle, with pushes of others on their way to it."""
    run = run_of(dying(rule, {0: at_step}))
    outcome = train_here(run)
    assert_survived(outcome, [1, 2, 3])
    assert rounds(outcome, "server 1")
    task = run.make_task()
    assert held_out(task, run.seed, outcome.merged())["loss"] < held_out(task, run.seed)["loss"]


@pytest.mark.parametrize("rule", SERVED, ids=short)
def test_so_does_the_one_after_that(rule: ServerRule) -> None:
    outcome = train_here(run_of(dying(rule, {0: 4, 1: 8})))
    assert_survived(outcome, [2, 3])
    assert rounds(outcome, "server 2")


def test_no_push_counts_twice() -> None:
    """The successor goes on from what it pulled last: of its own pushes that lacks at most the one on its way."""
    Tally.seen.clear()
    outcome = train_here(run_of(dying(Tally(), {0: 8})))
    assert_survived(outcome, [1, 2, 3])
    counts, taken = outcome.params[1][:4].tolist(), [worker for worker, _staleness in Tally.seen]
    assert all(counts[worker] <= taken.count(worker) <= 8 for worker in range(4))
    assert taken.count(0) <= 4
    assert counts[1] >= 7
