"""Who takes part: rules, rules under several settings, controls."""

from __future__ import annotations

import pytest
import torch
from cluster import cluster, crash, quadratic

from decentral.compare.budget import fitted, measured
from decentral.compare.entries import entries_of, folder_name
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.protocols import DiLoCo, Nesterov, NoLoCo, OuterSGD
from decentral.protocols.schedule import Every
from decentral.sim.simulate import simulate

RUN = cluster(DiLoCo(period=Every(period=4), outer=Nesterov(lr=0.5, momentum=0.3)))


def test_a_table_may_name_the_rule_whose_settings_it_has() -> None:
    run = RUN.model_copy(update={"compare": {"often": {"rule": "diloco", "period": 1}, "noloco": {"alpha": 0.25}}})
    (_, often), (_, usual), (_, noloco) = entries_of(run, ["often", "diloco", "noloco"])
    assert often.rule == DiLoCo(period=Every(period=1), outer=Nesterov(lr=0.5, momentum=0.3))
    assert usual.rule == RUN.rule
    assert noloco.rule == NoLoCo(period=Every(period=4), alpha=0.25)


def test_settings_are_multiplied_and_rules_without_the_field_are_there_once() -> None:
    found = entries_of(RUN, ["ddp", "diloco"], ["rule.period=2, 8", "inner.lr=0.1,0.2"])
    assert [name for name, _ in found] == [
        *("ddp lr=0.1", "ddp lr=0.2"),
        *(f"diloco period={period} lr={lr}" for period in (2, 8) for lr in (0.1, 0.2)),
    ]
    _, last = found[-1]
    assert (last.rule, last.inner.lr) == (RUN.rule.model_copy(update={"period": Every(period=8)}), 0.2)


def test_a_value_may_be_a_table() -> None:
    found = entries_of(RUN, ["diloco"], ['rule.outer={name = "sgd", lr = 0.7},{name = "nesterov"}'])
    assert [run.rule.outer for _, run in found] == [OuterSGD(lr=0.7), Nesterov()]  # type: ignore[attr-defined]
    assert len({folder_name(name) for name, _ in found}) == 2


@pytest.mark.parametrize("text", ["rule.period", "rule.period=", "rule.period=1,,2", "period=1,2", "fleet.up_bps=1,2"])
def test_what_cannot_be_varied_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--vary .* expected a field of the rule or of the inner optimiser"):
        entries_of(RUN, ["diloco"], [text])


def test_a_field_that_nobody_has_is_refused_and_a_wrong_value_named() -> None:
    with pytest.raises(ConfigError, match="none of ddp, diloco has this field"):
        entries_of(RUN, ["ddp", "diloco"], ["rule.alpha=1,2"])
    with pytest.raises(ConfigError, match=r"--vary, diloco period=0: rule.period: must be at least 1"):
        entries_of(RUN, ["diloco"], ["rule.period=5,0"])


def test_a_table_of_no_rule_is_refused() -> None:
    run = RUN.model_copy(update={"compare": {"often": {"rule": 3}}})
    with pytest.raises(ConfigError, match=r"compare.often.rule: 3 is not the name of a rule"):
        entries_of(run, ["often"])


def test_one_worker_alone_trains_as_plain_sgd_does() -> None:
    """On as many samples as all have together; whatever befalls the fleet does not befall it."""
    run = cluster(DiLoCo(period=Every(period=4)), 3, 8, events=[crash(0.1, 2)])
    *_, (name, alone), (outer_name, _) = entries_of(run, ["ddp", "diloco"], controls=True)
    assert (name, outer_name) == ("one_worker", "one_worker_diloco")
    alone = fitted(alone, "samples", measured(run, "samples"))
    outcome = simulate(alone)
    assert outcome.samples() == 3 * 8
    assert sum(left.sent_bytes for left in outcome.left()) == 0
    assert outcome.seconds == pytest.approx(24 * run.fleet.step_time_s)
    expected = quadratic(run).after_sgd(0, lr=0.1, steps=24)
    assert torch.allclose(outcome.merged(), expected, atol=1e-5)


def test_the_other_control_has_the_outer_optimiser_too() -> None:
    """Outer SGD of rate 1/2 on one worker is Lookahead: half the way after each period."""
    run = cluster(DiLoCo(period=Every(period=5), outer=OuterSGD(lr=0.5)), 3, 10)
    *_, (_, alone) = entries_of(run, ["diloco"], controls=True)
    task = quadratic(run)
    slow = torch.full((16,), task.start)
    for _ in range(2):
        slow = slow + 0.5 * (task.after_sgd(0, lr=0.1, steps=5, x0=slow) - slow)
    assert torch.allclose(simulate(alone).merged(), slow, atol=1e-5)


def test_a_control_that_cannot_be_alone_is_refused() -> None:
    run = Run(**{**cluster(DiLoCo(period=Every(period=2)), 4, 4).to_fields(), "pipeline": {"stages": 2}})
    run = run.model_copy(update={"task": {"name": "layer_stack"}, "batch_size": 4})
    with pytest.raises(ConfigError, match="--controls"):
        entries_of(run, ["diloco"], controls=True)
