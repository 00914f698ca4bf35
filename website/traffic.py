"""What a rule sends, counted: a timing-only simulation of it, whose messages are the rule's own."""

from __future__ import annotations

from decentral.config import validated
from decentral.protocols import Every, SyncRule
from decentral.sim.simulate import simulate

WORKERS = 4
ROUNDS = 2
STEPS = 100
"""Fewest local steps, and those of rules whose period is not a plain number of them."""


def bytes_sent(rule: SyncRule) -> float:
    """Return the bytes that a worker sends for each parameter in a local step, the mean over four workers.

    The model is the built-in byte GPT; the rule goes through two periods, and through a hundred steps at least.
    """
    period = getattr(rule, "period", None)
    steps = ROUNDS * period.period if isinstance(period, Every) else STEPS
    run = validated(
        {
            "steps": max(steps, STEPS),
            "evaluate_every": 0,
            "rule": rule,
            "inner": {"name": "sgd", "lr": 1e-3},
            "fleet": {"workers": [{"count": WORKERS}]},
        },
        rule.spelling(),
    )
    outcome = simulate(run, timing_only=True)
    return (
        sum(left.sent_bytes for left in outcome.left()) / outcome.samples() * run.batch_size / outcome.totals.parameters
    )
