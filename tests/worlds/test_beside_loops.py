"""Every rule beside training loops: it comes to the same bits as on a worker that trains by itself, or is refused."""

from __future__ import annotations

import pytest
from cases import CASES, Case
from loops import train_loops
from sockets import train_here
from test_same_rule import QUADRATIC, assert_same_replicas

from decentral.config import Run, validated
from decentral.embedded.join import ENDLESS
from decentral.errors import ConfigError

GRADIENTS = {"ddp", "demo", "psyche", "ef21_sgdm", "savic", "fedspeed", "dadao", "gradient_coding", "sr_sgc", "m_sgc"}
REFUSED = GRADIENTS | {"just_one_byte", "fedkseed", "pbt", "dbw"}
KNOWS_THE_END = ("palsgd", "hierarchical", "eager_diloco")
"""What these do last depends on their knowing that it is the last."""


def refuses(case: Case, endless: bool = False) -> bool:
    try:
        case.rule.check_own_loop(norms=False, endless=endless)
    except ConfigError:
        return True
    return False


OWN_OPTIMIZERS = ("adopt", "qhadam", "muon")
ABLE = {
    name: case
    for name, case in CASES.items()
    if not refuses(case) and case.fields.get("inner", {}).get("name") not in OWN_OPTIMIZERS
}


def run_of(case: Case) -> Run:
    return validated(
        {
            "steps": case.steps,
            "batch_size": 4,
            "evaluate_every": 0,
            "task": QUADRATIC,
            "rule": case.rule,
            "inner": {"name": "sgd", "lr": 0.1},
            "fleet": {"workers": [{"count": case.workers}]},
            **case.fields,
        },
        "test",
    )


def test_rules_that_need_more_than_local_steps_are_refused() -> None:
    refused = {case.rule.name for case in CASES.values() if refuses(case)}
    assert refused >= REFUSED
    kinds = {case.rule.name for case in ABLE.values()}
    assert kinds.isdisjoint(REFUSED)
    assert refused - kinds == REFUSED  # of other rules some settings are refused, and others run


@pytest.mark.parametrize("name", ABLE)
def test_a_rule_beside_loops_does_what_it_does_on_workers(name: str) -> None:
    case = ABLE[name]
    run = run_of(case)
    outcome = train_loops(run)
    if case.exact:
        assert_same_replicas(outcome, train_here(run))
    assert [(left.reason, left.step) for left in outcome.left()] == [("finished", case.steps)] * case.workers


@pytest.mark.parametrize("name", [name for name, case in ABLE.items() if not refuses(case, endless=True)])
def test_loops_may_end_when_they_like(name: str) -> None:
    """Nobody has said how many steps there are: the round that is under way when all loops end is their last."""
    case = ABLE[name]
    run = run_of(case)
    outcome = train_loops(run.model_copy(update={"steps": ENDLESS}), case.steps)
    assert [(left.reason, left.step) for left in outcome.left()] == [("finished", case.steps)] * case.workers
    if case.exact and case.rule.name not in KNOWS_THE_END:
        for worker, params in train_here(run).params.items():
            assert params.equal(outcome.params[worker])
