"""The promise of the whole: a rule comes to the same bits and the same bytes in the simulated and in the real world."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from decentral.config import Run, validated
from decentral.journal import Evaluated, Synced
from decentral.outcome import Outcome
from decentral.protocols import RULES
from decentral.sim.simulate import simulate
from decentral.workers.launch import train

QUADRATIC = {"name": "quadratic", "dimension": 1003, "noise": 0.1}
BYTE_GPT = {
    "name": "byte_gpt",
    "width": 32,
    "depth": 1,
    "heads": 2,
    "context": 32,
    "eval_windows": 8,
    "corpus": argparse.__file__,
}


def run_of(task: dict[str, Any], rule: str, **fields: Any) -> Run:
    if "period" in RULES[rule].model_fields:
        fields = {"period": 3, **fields}
    inner = {"name": "sgd", "lr": 0.1} if task is QUADRATIC else {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0}
    return validated(
        {
            "steps": 8,
            "batch_size": 4,
            "evaluate_every": 3,
            "task": task,
            "rule": {"name": rule, **fields},
            "inner": inner,
            "fleet": {"workers": [{"count": 1}, {"speed": 0.7}, {"speed": 0.4}]},
        },
        "test",
    )


def rounds(outcome: Outcome) -> list[tuple[Any, ...]]:
    return sorted(
        (record.worker, record.channel, record.round, record.outcome, record.members)
        for record in outcome.records
        if isinstance(record, Synced)
    )


def evaluations(outcome: Outcome) -> list[tuple[Any, ...]]:
    return sorted(
        (record.step, *record.metrics.items())
        for record in outcome.records
        if isinstance(record, Evaluated) and record.worker == 0
    )


def assert_same(real: Outcome, simulated: Outcome) -> None:
    assert_same_replicas(real, simulated)
    assert evaluations(real) == evaluations(simulated)
    assert (real.before, real.after) == (simulated.before, simulated.after)


def assert_same_replicas(real: Outcome, simulated: Outcome) -> None:
    """Assert equal bits of parameters and slots, equal bytes and messages, and equal rounds."""
    assert real.params.keys() == simulated.params.keys()
    for worker in simulated.params:
        assert real.params[worker].equal(simulated.params[worker]), f"worker {worker}"
        assert real.slots[worker].keys() == simulated.slots[worker].keys()
        for name, slot in real.slots[worker].items():
            assert slot.equal(simulated.slots[worker][name]), f"worker {worker}, slot {name}"
    for here, there in zip(real.left(), simulated.left(), strict=True):
        assert (here.reason, here.step) == (there.reason, there.step)
        assert (here.sent_bytes, here.messages_sent) == (there.sent_bytes, there.messages_sent)
        assert here.received_bytes == there.received_bytes
    assert rounds(real) == rounds(simulated)
    assert real.samples() == simulated.samples()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("rule", ["gossip", "single_merge"])
def test_a_quadratic_comes_to_the_same_in_both_worlds(rule: str) -> None:
    run = run_of(QUADRATIC, rule)
    assert_same(train(run), simulate(run))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("ddp", {"buckets": {"name": "buckets", "megabytes": 0.02}, "codec": "bf16"}),
        ("diloco", {"codec": "int8", "all_reduce": "ring"}),
        ("noloco", {"gamma": 0.5}),
    ],
)
def test_a_gpt_comes_to_the_same_in_both_worlds(rule: str, fields: dict[str, Any]) -> None:
    run = run_of(BYTE_GPT, rule, **fields)
    assert_same(train(run), simulate(run))
