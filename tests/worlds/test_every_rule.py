"""Every rule in both worlds, over real sockets, and what is true of every rule."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from cluster import timed_by_messages
from sockets import train_here
from test_same_rule import QUADRATIC, assert_same_replicas

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.journal import Synced
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import RULES
from decentral.replica import held_out
from decentral.sim.simulate import simulate

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
exact_case = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.exact], ids=[name for name, case in CASES.items() if case.exact]
)


def run_of(case: Case, *, speeds: tuple[float, ...] = (1.0, 0.7, 0.4), **fields: object) -> Run:
    speeds = (speeds * case.workers)[: case.workers]
    return validated(
        {
            "steps": case.steps,
            "batch_size": 4,
            "evaluate_every": 0,
            "task": QUADRATIC,
            "rule": case.rule,
            "inner": {"name": "sgd", "lr": 0.1},
            "fleet": {"workers": [{"speed": speed} for speed in speeds]},
            **case.fields,
            **fields,
        },
        "test",
    )


def test_every_rule_has_a_case() -> None:
    assert {case.rule.name for case in CASES.values()} == set(RULES)


@exact_case
def test_both_worlds_come_to_the_same_bits_and_bytes(case: Case) -> None:
    run = run_of(case)
    assert_same_replicas(train_here(run), simulate(run))


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if not case.exact],
    ids=[name for name, case in CASES.items() if not case.exact],
)
def test_where_the_order_of_arrival_counts_both_worlds_train(case: Case) -> None:
    """Unequal moments make unequal numbers; every worker does its steps, talks, and gets better in either world."""
    run = run_of(case)
    start = held_out(run.make_task(), run.seed)["loss"]
    for outcome in (train_here(run), simulate(run)):
        assert [(left.reason, left.step) for left in outcome.left()] == [("finished", case.steps)] * case.workers
        assert all(left.sent_bytes > 0 for left in outcome.left())
        assert loss_of(run, outcome) < start


def loss_of(run: Run, outcome: Outcome) -> float:
    return held_out(run.make_task(), run.seed, outcome.merged())["loss"]


@every_case
def test_the_same_simulation_twice_is_the_same_to_the_bit(case: Case) -> None:
    first, second = (simulate(run_of(case, speeds=(1.0, 0.6, 0.45))) for _ in range(2))
    for worker, params in first.params.items():
        assert params.equal(second.params[worker])
    assert [record.to_json() for record in first.records] == [record.to_json() for record in second.records]


@every_case
def test_nothing_shares_storage_and_something_was_synced(case: Case) -> None:
    """An anchor that shares storage with the live parameters has an outer gradient of zero for ever."""
    base = type(case.rule)

    class Watched(base):  # type: ignore[misc, valid-type]
        async def run(self, peer: Peer) -> None:
            await super().run(peer)
            places = [peer.params, peer.grads, *peer.slots.values()]
            for index, one in enumerate(places):
                for other in places[:index]:
                    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()

    fields = {field: getattr(case.rule, field) for field in base.model_fields}
    outcome = simulate(run_of(Case(Watched(**fields), case.workers, case.steps, fields=case.fields)))
    assert any(left.sent_bytes > 0 for left in outcome.left())


@every_case
def test_a_worker_that_dies_costs_a_bounded_time_and_leaves_finite_replicas(case: Case) -> None:
    run = run_of(case, patience_s=5.0)
    fleet = run.fleet.to_table()
    fleet["events"] = [{"at_s": simulate(run, timing_only=True).seconds / 2, "worker": case.workers - 1}]
    outcome = simulate(run_of(case, patience_s=5.0, fleet=fleet))
    reasons = {left.worker: left.reason for left in outcome.left()}
    assert reasons == {**dict.fromkeys(range(case.workers - 1), "finished"), case.workers - 1: "crashed"}
    assert all(torch.isfinite(params).all() for params in outcome.params.values())
    assert {left.step for left in outcome.left() if left.reason == "finished"} == {case.steps}
    known = {"committed", "degraded", "skipped"}
    assert {record.outcome for record in outcome.records if isinstance(record, Synced)} <= known


@every_case
def test_one_worker_trains_or_is_told_why_not(case: Case) -> None:
    alone = Case(case.rule, 1, case.steps, fields=case.fields)
    try:
        run = run_of(alone)
    except ConfigError:
        with pytest.raises(ConfigError, match="worker"):
            run_of(alone)
        return
    outcome = simulate(run)
    assert [(left.reason, left.step) for left in outcome.left()] == [("finished", case.steps)]


@every_case
def test_time_alone_can_be_simulated(case: Case) -> None:
    run = run_of(case)
    timed, trained = simulate(run, timing_only=True), simulate(run)
    if case.exact and case.timed:
        assert timed_by_messages(run).seconds == trained.seconds
        assert timed.seconds == pytest.approx(trained.seconds, rel=0, abs=1e-9)
        assert [left.sent_bytes for left in timed.left()] == [left.sent_bytes for left in trained.left()]


@every_case
def test_nobody_sends_more_than_anybody_takes(case: Case) -> None:
    """`Peer.send` refuses it; a model so large that a packet's spare megabyte hides nothing. Sizes alone."""
    timed_by_messages(run_of(case, task={**QUADRATIC, "dimension": 2_000_000}))
