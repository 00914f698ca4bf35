"""Stages whose workers are lost come back: copied where somebody holds them, rebuilt where nobody does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from blocks import Chain, named
from sockets import Died, train_here

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.journal import Left, Rebuilt, Synced, Trained
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import RULES, SyncRule
from decentral.sim.simulate import simulate

STEPS = 60
STAGES = 4
CRASH_S, BACK_S, PATIENCE_S = 3.0, 4.0, 10.0


def run_of(rule: Any, *, replicas: int = 1, lost: dict[int, tuple[float, float]] | None = None, **fields: Any) -> Run:
    """Return a run in which the workers `lost` crash and are back at these times."""
    events = []
    for worker, (crash_s, back_s) in (lost or {}).items():
        events += [{"kind": "crash", "worker": worker, "at_s": crash_s}]
        events += [{"kind": "join", "worker": worker, "at_s": back_s}]
    return validated(
        {
            "steps": STEPS,
            "batch_size": 4,
            "evaluate_every": 10,
            "patience_s": PATIENCE_S,
            "task": named(Chain, layers=2 * STAGES),
            "rule": rule,
            "inner": {"name": "adamw", "lr": 3e-3, "clip_norm": 1.0},
            "pipeline": {"stages": STAGES, "microbatches": 2},
            "fleet": {"workers": [{"count": STAGES * replicas}], "events": events, "detection_s": 0.2},
            **fields,
        },
        "test",
    )


def settings(name: str) -> dict[str, Any]:
    return {"name": name, **({} if name == "ddp" else {"period": 5})}


def steps_done(outcome: Outcome) -> Counter[int]:
    """Return the local steps of each worker, over all its lives."""
    return Counter({worker: max(record.step for record in trained(outcome, worker)) for worker in outcome.params})


def trained(outcome: Outcome, worker: int) -> list[Trained]:
    return [record for record in outcome.records if isinstance(record, Trained) and record.worker == worker]


def rebuilt(outcome: Outcome) -> list[tuple[int, tuple[int, ...]]]:
    return [(record.worker, record.members) for record in outcome.records if isinstance(record, Rebuilt)]


@pytest.mark.parametrize("victim", [1, 2])
def test_a_stage_that_nobody_holds_is_rebuilt_from_its_neighbours_without_going_back(victim: int) -> None:
    """The others wait while it is away, do the step anew that was under way, and lose none."""
    quiet = simulate(run_of(settings("local_sgd")))
    outcome = simulate(run_of(settings("local_sgd"), lost={victim: (CRASH_S, BACK_S)}))
    assert rebuilt(outcome) == [(victim, (victim - 1, victim + 1))]
    assert {left.reason for left in outcome.left()} == {"crashed", "finished"}
    assert steps_done(outcome) == Counter(dict.fromkeys(range(STAGES), STEPS))
    assert outcome.samples() == quiet.samples() == 4 * STEPS
    assert outcome.seconds - quiet.seconds == pytest.approx(BACK_S - CRASH_S, abs=0.3)
    assert [seen.step for seen in outcome.evaluations()] == [seen.step for seen in quiet.evaluations()]
    assert outcome.after["loss"] == pytest.approx(quiet.after["loss"], rel=0.1)


def test_stages_that_are_not_beside_each_other_may_be_lost_together() -> None:
    lost = {1: (CRASH_S, BACK_S + 1), 3: (CRASH_S, BACK_S)}
    outcome = simulate(run_of(settings("local_sgd"), lost=lost, task=named(Chain, layers=2 * STAGES)))
    assert sorted(rebuilt(outcome)) == [(1, (0, 2)), (3, (2,))]
    assert steps_done(outcome) == Counter(dict.fromkeys(range(STAGES), STEPS))


def test_who_is_lost_while_the_row_comes_together_is_waited_for_too() -> None:
    lost = {1: (CRASH_S, BACK_S), 3: (BACK_S + 0.03, BACK_S + 1)}
    outcome = simulate(run_of(settings("local_sgd"), lost=lost))
    assert {worker for worker, _ in rebuilt(outcome)} == {1, 3}
    assert steps_done(outcome) == Counter(dict.fromkeys(range(STAGES), STEPS))


def test_two_stages_beside_each_other_that_are_lost_together_end_the_run_with_a_word_on_checkpoints() -> None:
    lost = dict.fromkeys((0, 1, 2), (CRASH_S, BACK_S))  # stage 3 could help stage 2 alone
    with pytest.raises(ConfigError, match="stage 0 of its replica is lost and so are those beside it"):
        simulate(run_of(settings("local_sgd"), lost=lost))


def test_whoever_does_not_come_back_is_not_waited_for_for_ever() -> None:
    left: list[Left] = []
    run = run_of(settings("local_sgd"), lost={1: (CRASH_S, 1e6)})
    with pytest.raises(ConfigError, match="nobody is left at the end"):
        simulate(run, on_record=lambda record: left.append(record) if isinstance(record, Left) else None)
    reasons = ["crashed", "of its replica, stage 1, worker 1 does not come, or does not answer"]
    assert [record.reason for record in left][:2] == reasons
    assert left[1].time_s == pytest.approx(CRASH_S + 20 * PATIENCE_S, abs=1.0)


def test_whoever_finishes_first_is_not_taken_for_lost() -> None:
    """The word on the last step comes late to stage 2, over a thin line, when stages 1 and 3 have left."""
    thin = {"workers": [{"count": 2}, {"count": 1, "down_bps": 2e3}, {"count": 1}] * 2}
    outcome = simulate(run_of(settings("gossip"), replicas=2, fleet=thin, steps=5, evaluate_every=0))
    assert [(left.reason, left.step) for left in outcome.left()] == [("finished", 5)] * 2 * STAGES
    assert outcome.seconds < 10 * PATIENCE_S


def test_a_run_that_ends_without_one_of_the_stages_says_so() -> None:
    run = run_of(settings("local_sgd"), lost={1: (7.96, 1e6)}, evaluate_every=0, steps=STEPS - 10)  # in the last round
    with pytest.raises(ConfigError, match="nobody with stage 1 is left at the end"):
        simulate(run)


@pytest.mark.parametrize("rule", ["ddp", "local_sgd", "diloco", "noloco", "gossip"])
def test_a_stage_that_another_replica_holds_is_copied(rule: str) -> None:
    """Nobody waits for a deadline."""
    quiet = simulate(run_of(settings(rule), replicas=2))
    outcome = simulate(run_of(settings(rule), replicas=2, lost={2: (CRASH_S, BACK_S)}))
    assert rebuilt(outcome) == []
    assert steps_done(outcome) == Counter(dict.fromkeys(range(2 * STAGES), STEPS))
    assert outcome.seconds - quiet.seconds < 2 * (BACK_S - CRASH_S)
    assert [seen.step for seen in outcome.evaluations()] == [seen.step for seen in quiet.evaluations()]
    assert outcome.after["loss"] == pytest.approx(quiet.after["loss"], rel=0.1)
    if rule in ("ddp", "local_sgd", "diloco"):
        for stage in range(STAGES):
            assert outcome.params[stage].equal(outcome.params[STAGES + stage])
    last = max(record.round for record in outcome.records if isinstance(record, Synced))
    ends = [record for record in outcome.records if isinstance(record, Synced) and record.round == last]
    assert {record.outcome for record in ends} == {"committed"}
    if rule in ("ddp", "local_sgd", "diloco"):
        assert {record.members for record in ends} == {(stage, STAGES + stage) for stage in range(STAGES)}


@pytest.mark.parametrize("crash_s", [1.5, 1.53, 1.56, 1.6, 1.65, 1.7])
@pytest.mark.parametrize(
    "lost",
    [
        {2: (0.0, 0.3)},
        {2: (0.0, 0.3), 5: (-0.02, 0.9)},  # both rows come together again, one after the other
        {5: (0.0, 0.9), 2: (0.08, 0.35)},  # row 0 is a step ahead of worker 6, which has stage 2 and waits for 5
    ],
    ids=["one", "both rows", "a row ahead"],
)
def test_under_ddp_a_stage_is_copied_wherever_in_a_step_it_is_lost(
    lost: dict[int, tuple[float, float]], crash_s: float
) -> None:
    """Who has it may wait, between the round on a gradient and its update, for a row that waits for this very copy."""
    fields: dict[str, Any] = {"replicas": 2, "steps": 12, "evaluate_every": 0}
    times = {worker: (crash_s + gone_s, crash_s + back_s) for worker, (gone_s, back_s) in lost.items()}
    quiet = simulate(run_of(settings("ddp"), **fields), timing_only=True)
    outcome = simulate(run_of(settings("ddp"), **fields, lost=times))
    assert {left.reason for left in outcome.left()} == {"crashed", "finished"}
    assert outcome.seconds - quiet.seconds < 2.0
    assert steps_done(outcome) == Counter(dict.fromkeys(range(2 * STAGES), 12))
    for stage in range(STAGES):
        assert outcome.params[stage].equal(outcome.params[STAGES + stage])


@pytest.mark.parametrize("victim", range(1, STAGES))
def test_a_stage_lost_in_the_last_phase_takes_part_in_the_last_evaluation(victim: int) -> None:
    quiet = simulate(run_of(settings("local_sgd")))
    late = quiet.seconds - 0.3
    lost = {victim: (late, late + 1.0)}
    recovery = {"stages": STAGES, "microbatches": 2, "recovery": {"name": "redundant"}}
    outcome = simulate(run_of(settings("local_sgd"), lost=lost, pipeline=recovery))
    assert len(rebuilt(outcome)) == 1
    assert [seen.step for seen in outcome.evaluations()] == [seen.step for seen in quiet.evaluations()]


@pytest.mark.parametrize("rule", ["ddp", "diloco", "noloco"])
def test_replicas_that_share_their_microbatches_wait_together_for_a_lost_stage(rule: str) -> None:
    pipeline = {"stages": STAGES, "microbatches": 2, "paths": "permuted"}
    quiet = simulate(run_of(settings(rule), replicas=2, pipeline=pipeline))
    outcome = simulate(run_of(settings(rule), replicas=2, lost={2: (CRASH_S, BACK_S)}, pipeline=pipeline))
    assert rebuilt(outcome) == []  # the other replica has it
    assert steps_done(outcome) == Counter(dict.fromkeys(range(2 * STAGES), STEPS))
    assert outcome.seconds - quiet.seconds == pytest.approx(BACK_S - CRASH_S, abs=0.3)
    assert outcome.after["loss"] == pytest.approx(quiet.after["loss"], rel=0.05)


def test_a_stage_that_all_replicas_have_lost_is_rebuilt_in_each() -> None:
    lost = {1: (CRASH_S, BACK_S), STAGES + 1: (CRASH_S, BACK_S + 0.5)}
    outcome = simulate(run_of(settings("diloco"), replicas=2, lost=lost))
    assert {left.reason for left in outcome.left()} == {"crashed", "finished"}
    assert rebuilt(outcome)[0] == (1, (0, 2))
    for stage in range(STAGES):
        assert outcome.params[stage].equal(outcome.params[STAGES + stage])


def test_times_alone_are_those_of_real_training() -> None:
    run = run_of(settings("local_sgd"), lost={1: (CRASH_S, BACK_S)}, evaluate_every=0)
    assert simulate(run, timing_only=True).seconds == pytest.approx(simulate(run).seconds, rel=1e-3)


class Broken:
    """Has a worker die in the midst of a batch, as it is about to compute for the n-th time."""

    def __init__(self, peer: Peer, computations: int) -> None:
        self._work, self._left = peer.work, computations

    async def work(self, kind: str, *arguments: Any) -> Any:
        if kind == "compute":
            self._left -= 1
            if self._left == 0:
                raise Died
        return await self._work(kind, *arguments)


def breaking(name: str, victims: dict[int, int]) -> SyncRule:
    """Return the rule under which these workers die once, at so many computations."""
    base, broken = RULES[name], set[int]()

    class Breaking(base):  # type: ignore[misc, valid-type]
        async def run(self, peer: Peer) -> None:
            if peer.id in victims and peer.id not in broken:
                broken.add(peer.id)
                peer.work = Broken(peer, victims[peer.id]).work
            await super().run(peer)

    return Breaking(**({} if name == "ddp" else {"period": 5}))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("victims", "sources"), [({1: 47}, (0, 2)), ({2: 50}, (1, 3)), ({3: 61}, (2,))])
def test_over_sockets_a_stage_is_rebuilt_in_the_midst_of_a_batch(
    victims: dict[int, int], sources: tuple[int, ...]
) -> None:
    run = run_of(settings("local_sgd")).model_copy(update={"rule": breaking("local_sgd", victims)})
    outcome = train_here(run, lives=2)
    assert rebuilt(outcome) == [(worker, sources) for worker in victims]
    assert steps_done(outcome) == Counter(dict.fromkeys(range(STAGES), STEPS))
    assert all(torch.isfinite(params).all() for params in outcome.params.values())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["ddp", "diloco", "noloco"])
def test_over_sockets_a_stage_is_copied_from_another_replica(rule: str) -> None:
    run = run_of(settings(rule), replicas=2).model_copy(update={"rule": breaking(rule, {2: 50})})
    outcome = train_here(run, lives=2)
    assert rebuilt(outcome) == []
    assert steps_done(outcome) == Counter(dict.fromkeys(range(2 * STAGES), STEPS))
    reasons = {record.reason for record in outcome.records if isinstance(record, Left)}
    assert reasons == {"crashed", "finished"}
    if rule != "noloco":
        for stage in range(STAGES):
            assert outcome.params[stage].equal(outcome.params[STAGES + stage])


def test_a_run_stopped_while_a_stage_is_lost_has_no_whole_model_at_its_end() -> None:
    run = run_of(settings("diloco"), lost={1: (CRASH_S, BACK_S)})
    outcome = simulate(run, until=lambda record: isinstance(record, Left) and record.worker == 1)
    assert {left.worker: left.reason for left in outcome.left()} == {
        0: "stopped",
        1: "crashed",
        2: "stopped",
        3: "stopped",
    }
    assert outcome.after == {}
    assert sorted(outcome.params) == [0, 2, 3]


@pytest.mark.parametrize("way", ["checkfree", "checkfree_plus"])
def test_who_evaluates_does_not_wait_for_others_who_wait_for_it(way: str) -> None:
    """A stage is lost while some know already that the step before an evaluation is done, and others do not yet."""
    fields = {"patience_s": 1000.0, "steps": 15, "evaluate_every": 5}
    pipeline = {"stages": STAGES, "microbatches": 2, "recovery": way}
    fleet = {"workers": [{"count": STAGES}], "latency_s": 0.1, "detection_s": 0.05}
    quiet = simulate(run_of(settings("diloco"), **fields, pipeline=pipeline, fleet=fleet))
    done_s = next(record.time_s for record in quiet.records if isinstance(record, Trained) and record.step == 5)
    for late in range(-8, 9):
        crash_s = done_s + late / 40
        events = [{"kind": kind, "worker": 2, "at_s": crash_s + s} for kind, s in (("crash", 0.0), ("join", 1.0))]
        run = run_of(settings("diloco"), **fields, pipeline=pipeline, fleet={**fleet, "events": events})
        assert simulate(run).seconds < quiet.seconds + 10, f"lost {late / 40} s after the fifth step"
