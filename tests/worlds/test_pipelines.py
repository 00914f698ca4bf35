"""A model cut into stages trains as the uncut one, in virtual time and over sockets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import Chain, Noisy, TiedEnds, named
from cases import CASES, Case
from sockets import train_here
from test_same_rule import assert_same_replicas

from decentral.config import Run, validated
from decentral.errors import ConfigError, TaskError
from decentral.journal import Left, Trained
from decentral.peer import Peer
from decentral.pipeline import Permuted
from decentral.protocols import SyncRule
from decentral.sim.simulate import simulate

CHAIN = named(Chain)
GPT = {"name": "byte_gpt", "width": 16, "depth": 4, "heads": 2, "context": 16, "eval_windows": 8}
NEED_WHOLE_MODELS = {
    *("just_one_byte", "fedkseed"),  # which look at losses of the model as it would be
    *("gradient_coding", "sr_sgc", "m_sgc"),  # which compute gradients of others' batches
    *("pbt", "modest", "dbw", "fedcompass"),  # in which not every replica does the same steps
    *("diloco, steps by speed", "noloco, steps by speed", "local_sgd by the clock"),
}
AT_ONCE = {"latency_s": 0.0, "up_bps": 1e15, "down_bps": 1e15}


def run_of(stages: int, microbatches: int = 1, *, replicas: int = 1, fleet: Any = (), **fields: Any) -> Run:
    return validated(
        {
            "steps": 20,
            "batch_size": 4,
            "evaluate_every": 10,
            "task": CHAIN,
            "rule": {"name": "local_sgd", "period": 5},
            "inner": {"name": "adamw", "lr": 1e-3, "clip_norm": 0.5},
            "pipeline": {"stages": stages, "microbatches": microbatches} if stages > 1 else {},
            "fleet": {"workers": [{"count": stages * replicas}], **dict(fleet)},
            **fields,
        },
        "test",
    )


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("task", [CHAIN, pytest.param(GPT, marks=pytest.mark.slow)], ids=["chain", "gpt"])
def test_a_pipeline_trains_as_the_whole_model_does(stages: int, task: dict[str, Any]) -> None:
    """Sums of microbatches and of stages' squares are rounded otherwise than those of a whole batch and model."""
    whole = simulate(run_of(1, task=task, steps=100)).merged()
    for microbatches in (1, 2, 4):
        merged = []
        for order in ("1f1b", "gpipe"):
            run = run_of(stages, microbatches, task=task, steps=100)
            pipeline = run.pipeline.model_copy(update={"order": order})
            merged.append(simulate(run.model_copy(update={"pipeline": pipeline})).merged())
        assert torch.allclose(merged[0], whole, rtol=0, atol=1e-5)
        assert merged[0].equal(merged[1])


def test_random_draws_are_the_same_with_any_cut() -> None:
    """Of blocks, wherever they are, and of the loss, of which two stages ask for a part each."""
    task = named(Noisy, layers=6)
    merged = [simulate(run_of(stages, 2, task=task, steps=100)).merged() for stages in (2, 3, 4, 6)]
    for other in merged[1:]:
        assert torch.allclose(other, merged[0], rtol=0, atol=1e-5)
    another = simulate(run_of(2, 2, task=task, steps=100, seed=1)).merged()
    assert not torch.allclose(another, merged[0], rtol=0, atol=1e-2)


def test_the_first_forward_pass_is_that_of_the_whole_model_to_the_bit() -> None:
    def first_loss(run: Run) -> float | None:
        return next(record.loss for record in simulate(run).records if isinstance(record, Trained) and record.loss)

    for task in (CHAIN, GPT):
        assert first_loss(run_of(3, task=task, steps=1)) == first_loss(run_of(1, task=task, steps=1))


@pytest.mark.parametrize("rule", ["ddp", "diloco", "noloco", "streaming_diloco"])
def test_both_worlds_come_to_the_same_bits_and_bytes(rule: str) -> None:
    run = run_of(3, 2, replicas=2, rule={"name": rule, **({} if rule == "ddp" else {"period": 5})})
    assert_same_replicas(train_here(run), simulate(run))


def test_columns_agree_as_replicas_of_whole_models_do() -> None:
    """Diloco's replicas are equal after every round, and what they come to is what whole models come to."""
    rule = {"name": "diloco", "period": 5}
    staged, whole = simulate(run_of(2, 2, replicas=4, rule=rule)), simulate(run_of(1, replicas=4, rule=rule))
    for stage in range(2):
        column = [staged.params[worker] for worker in range(stage, 8, 2)]
        assert all(params.equal(column[0]) for params in column)
    assert torch.allclose(staged.merged(), whole.merged(), rtol=0, atol=1e-5)
    assert staged.samples() == whole.samples()
    assert staged.after["loss"] == pytest.approx(whole.after["loss"], rel=1e-4)
    assert [seen.step for seen in staged.evaluations()] == [seen.step for seen in whole.evaluations()]


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES.keys())
def test_every_rule_trains_stages_or_says_why_not(name: str, case: Case) -> None:
    fields: dict[str, Any] = {"rule": case.rule, "steps": case.steps, **case.fields, "task": named(Chain, width=16)}
    fields["batch_size"] = 4
    if {name, case.rule.name} & NEED_WHOLE_MODELS:
        with pytest.raises(ConfigError, match=r"pipeline\.stages: .*; take "):
            run_of(2, 2, replicas=case.workers, **fields)
        return
    run = run_of(2, 2, replicas=case.workers, **fields)
    outcome = simulate(run)
    assert {(left.reason, left.step) for left in outcome.left()} == {("finished", case.steps)}
    assert torch.isfinite(outcome.merged()).all()


@pytest.mark.parametrize("order", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 4), (4, 4), (4, 8), (3, 6)])
def test_bubbles_are_what_the_schedule_says(order: str, stages: int, microbatches: int) -> None:
    """Of equal stages on a network that takes no time each is idle for (S - 1) / (M + S - 1) of a step."""
    run = run_of(
        stages, microbatches, fleet=AT_ONCE, batch_size=24, evaluate_every=0, task=named(Chain, layers=stages * 2)
    )
    pipeline = run.pipeline.model_copy(update={"order": order, "cuts": tuple(range(4, 4 * stages, 4))})
    outcome = simulate(run.model_copy(update={"pipeline": pipeline}), timing_only=True)
    for left in outcome.left():
        idle = 1 - left.seconds["compute"] / outcome.seconds
        assert idle == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-3)


def test_microbatches_that_change_replicas_train_as_one_batch_of_all_of_them_does() -> None:
    """Under ddp all gradients are averaged, so it does not matter which worker has computed which."""
    fields = {"replicas": 3, "rule": "ddp", "inner": {"name": "adamw", "lr": 1e-3}}
    fixed, permuted = run_of(3, 2, **fields), with_pipeline(run_of(3, 2, **fields), paths="permuted")
    one, other = simulate(fixed), simulate(permuted)
    assert torch.allclose(one.merged(), other.merged(), rtol=0, atol=1e-5)
    assert one.samples() == other.samples()
    assert other.after["loss"] == pytest.approx(one.after["loss"], rel=1e-4)


class Alone(SyncRule):
    """Nobody talks to anybody of its column."""

    async def run(self, peer: Peer) -> None:
        while await peer.train(10):
            pass


def test_replicas_whose_microbatches_change_places_stay_more_alike() -> None:
    """Nothing but the paths makes them alike (NoLoCo: 10 to 15 % less spread)."""
    run = run_of(2, 2, replicas=4, steps=100, evaluate_every=0).model_copy(update={"rule": Alone()})

    def spread(run: Run) -> float:
        behind = torch.stack([params for worker, params in simulate(run).params.items() if worker % 2])
        return float((behind - behind.mean(0)).square().mean().sqrt())

    permuted = run.model_copy(update={"pipeline": run.pipeline.model_copy(update={"paths": Permuted()})})
    assert spread(permuted) < spread(run)


def test_both_worlds_send_microbatches_the_same_ways() -> None:
    run = with_pipeline(run_of(3, 2, replicas=2, rule={"name": "noloco", "period": 5}), paths="permuted")
    assert_same_replicas(train_here(run), simulate(run))


def with_pipeline(run: Run, **fields: Any) -> Run:
    table = run.to_table()
    return validated({**table, "pipeline": {**table["pipeline"], **fields}}, "test")


@pytest.mark.parametrize("paths", ["straight", "swapped", "permuted"])
def test_head_and_embedding_may_be_one_stages_and_have_one_weight(paths: str) -> None:
    """Of tied weights, too, a pipeline makes what the uncut model does."""
    fields = {"task": named(TiedEnds, layers=8), "steps": 30, "replicas": 2, "rule": "ddp"}
    whole = simulate(run_of(1, **fields)).merged()
    run = with_pipeline(run_of(4, 2, **fields), head="first", paths=paths)
    outcome = simulate(run)
    if paths == "straight":
        assert torch.allclose(outcome.merged(), whole, rtol=0, atol=1e-5)
    assert outcome.after["loss"] < outcome.before["loss"]
    with pytest.raises(TaskError, match="tied weights must lie in one stage: untie them"):
        simulate(with_pipeline(run, head="last"))


def test_a_stage_that_does_not_fit_its_device_is_refused_and_smaller_ones_are_not() -> None:
    """96 GiB of parameters with gradients and AdamW's means: 24 for each of four stages, 12 for each of eight."""
    task = {"name": "byte_gpt", "width": 8192, "depth": 8, "heads": 8, "context": 16}
    fleet = {"workers": [{"count": 4, "device": "T4", "step_time_s": 1.0}]}
    fields = {"task": task, "steps": 1, "evaluate_every": 0, "rule": {"name": "local_sgd", "period": 1}}
    with pytest.raises(ConfigError, match=r"fleet.workers: worker 0 is a T4 with 16 GiB, and needs \d+\.\d GiB"):
        simulate(run_of(4, fleet=fleet, **fields), timing_only=True)
    eight = {"workers": [{"count": 8, "device": "T4", "step_time_s": 1.0}]}
    assert simulate(run_of(8, fleet=eight, **fields), timing_only=True).samples() == 4


def test_times_alone_are_those_of_real_training() -> None:
    run = run_of(3, 2, replicas=2, evaluate_every=0)
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_activations_may_travel_in_fewer_bytes(codec: str) -> None:
    run = run_of(2, 2, evaluate_every=0, task=GPT, steps=40)
    narrow = with_pipeline(run, codec=codec)
    exact, coded = simulate(run), simulate(narrow)
    assert sum(left.sent_bytes for left in coded.left()) < 0.7 * sum(left.sent_bytes for left in exact.left())
    assert not coded.merged().equal(exact.merged())
    assert coded.after["loss"] == pytest.approx(exact.after["loss"], rel=0.02)


def test_a_replica_that_loses_a_stage_for_good_leaves_and_the_others_go_on() -> None:
    """A rule that can take nobody in knows that at once."""
    fleet = {"events": [{"kind": "crash", "worker": 3, "at_s": 0.6}]}
    run = run_of(3, 2, replicas=3, fleet=fleet, rule={"name": "sgp", "period": 5})
    outcome = simulate(run)
    left = {record.worker: record.reason for record in outcome.records if isinstance(record, Left)}
    assert left[3] == "crashed"
    assert left[4] == "its replica has lost stage 0, worker 3"
    assert "its replica has lost" in left[5]
    assert {left[worker] for worker in (0, 1, 2, 6, 7, 8)} == {"finished"}
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fleet": {"workers": [{"count": 5}]}}, "pipeline.stages: 2 workers make a replica, and the fleet has 5"),
        ({"batch_size": 5}, "pipeline.microbatches: 2 do not divide a batch of 5 samples"),
        ({"pipeline": {"microbatches": 2}}, "a pipeline of one stage takes its batches whole"),
        ({"pipeline": {"stages": 2, "codec": "topk"}}, "'topk' leaves elements out"),
        ({"pipeline": {"stages": 2, "cuts": (4, 2)}}, "2 stages need 1 ascending numbers of blocks"),
        ({"leases": True}, "leases: not for a model that is cut into stages"),
        (
            {"fleet": {"workers": [{"count": 4}], "churn": {"name": "stage_losses", "per_hour": 0.1, "stages": 4}}},
            "fleet.churn.stages: 4, but pipeline.stages is 2",
        ),
        (
            {"rule": {"name": "local_sgd", "period": {"name": "dylu", "period": 5}}},
            "the stages of a replica take the same steps",
        ),
        ({"rule": {"name": "pbt", "groups": 2}}, "under rule 'pbt' groups are scored by their whole models"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_when_the_run_file_is_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(2, 2, replicas=2, **{"fleet": (), **fields})
