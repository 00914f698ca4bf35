"""The same work for all, measured out in samples, seconds or bytes: how many local steps a run gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.sim.simulate import simulate

Equal = Literal["samples", "seconds", "bytes"]
"""What all runs of a comparison get the same amount of: samples of all workers, virtual seconds, bytes sent by all
workers."""

CLOSE = 0.998
"""A run that uses up this share of its budget has as many steps as fit; its last round may leave the rest."""
TRIES = 16
MOST = 1000
"""A run gets at most so many times the steps of its run file."""


def measured(run: Run, equal: Equal) -> float:
    """Return what the run's local steps take, without training: samples, or virtual seconds or bytes of all workers.

    Samples are those handed out, all workers' steps: of a machine that is lost some are never trained on.
    """
    if equal == "samples":
        return run.steps * _samples_a_step(run)
    outcome = simulate(run, timing_only=True)
    return outcome.seconds if equal == "seconds" else sum(left.sent_bytes for left in outcome.left())


def fitted(run: Run, equal: Equal, budget: float) -> Run:
    """Return the run with as many local steps as the budget allows, so that its schedules end where it does.

    A model on one worker sends nothing, and keeps its steps under a budget of bytes. Raises `ConfigError` if not one
    step fits, if more steps do not take more, or if the parts of the run do not go with so many steps.
    """
    if equal == "bytes" and run.fleet.size == 1:
        return run
    if equal == "samples":
        steps = int(budget) // _samples_a_step(run)
        if not steps:
            raise _too_small(equal, budget)
    else:
        steps = most_steps(lambda count: measured(_with_steps(run, count), equal), run.steps, budget, equal)
    changed = _with_steps(run, steps)
    changed.check()
    return changed


def most_steps(spent: Callable[[int], float], start: int, budget: float, what: str) -> int:
    """Return the largest number of steps found for which `spent(steps)`, which grows with them, is within the budget.

    It begins at `start` steps and goes on in proportion: where costs are about linear, two or three tries are enough.
    Raises `ConfigError` if there is none, if twice the steps take no more, or if it is more than `MOST` times `start`.
    """
    fits, most = (0, 0.0), (0, 0.0)  # (steps, what they take): the most that fit, and the fewest that do not
    steps = start
    for tried in range(TRIES):
        taken = spent(steps)
        if taken > budget:
            most = (steps, taken)
        elif steps >= 2 * fits[0] > 0 and taken <= fits[1]:
            raise ConfigError(f"--equal {what}: {steps} local steps take no more {what} than {fits[0]}")
        else:
            fits = (steps, taken)
        if CLOSE * budget <= fits[1] or (most[0] and most[0] - fits[0] <= 1):
            break
        if most[0]:
            share = 0.5 if tried % 2 else (budget - fits[1]) / (most[1] - fits[1])
            steps = min(max(fits[0] + int(share * (most[0] - fits[0])), fits[0] + 1), most[0] - 1)
        else:
            in_proportion = int(steps * budget / taken) if taken else MOST * start + 1
            steps = in_proportion if in_proportion > steps and not tried else 2 * steps
            if steps > MOST * start:
                raise ConfigError(
                    f"--equal {what}: a budget of {budget:g} {what} allows more than {MOST} times the run file's "
                    f"{start} local steps; give a smaller --budget, or begin --rules with a rule that uses less"
                )
    if not fits[0]:
        raise _too_small(what, budget)
    return fits[0]


def _too_small(what: str, budget: float) -> ConfigError:
    return ConfigError(f"--equal {what}: not one local step fits into a budget of {budget:g} {what}")


def _samples_a_step(run: Run) -> int:
    return run.replicas * run.batch_size


def _with_steps(run: Run, steps: int) -> Run:
    return run.model_copy(update={"steps": steps})
