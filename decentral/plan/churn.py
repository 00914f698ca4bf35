"""What machines that come and go take of a run: who is there, by the model of churn; what a loss costs, simulated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import Churn, Exponential, Fleet, Preemption, Trace
from decentral.fleet.happenings import happenings, starters
from decentral.plan.forecast import Forecast, forecast, patience_s, steps_of_a_round
from decentral.plan.shrink import shrunk
from decentral.plan.work import Work
from decentral.protocols import DDP, Whole
from decentral.sim.simulate import simulate

ROUNDS = 16
"""Rounds in which the cost of a loss is measured,"""
LOSSES = 4.0
"""with about so many of them."""
COUNTED = 200
"""Losses by which it is told how often the model has one."""
HOPELESS = 100.0
"""A run that would take so many times as long as with all machines there all the time does not end."""


def forecast_with_churn(run: Run, work: Work) -> Forecast:
    """Return what the whole run will take, whoever comes and goes. Raises `ConfigError` as `forecast`.

    With all machines there all the time the work takes n T machine-seconds. A machine that is there does its part of
    it; each loss takes L machine-seconds from what has been done, of all workers together: what the lost one had not
    handed in, the others' waiting, and the newcomer's way into the run. Of the fleet's churn the events are walked
    through until the work is done. L is measured on rounds in which losses are more frequent, and places taken again
    sooner, than they are: hours of rounds take too long to simulate.
    """
    churn = run.fleet.churn
    steady = forecast(run.model_copy(update={"fleet": run.fleet.model_copy(update={"churn": None})}), work)
    if churn is None:
        return steady
    machine_s = run.fleet.size * steady.seconds
    seconds, rented_s = _walked(run.fleet, run.seed, machine_s, _lost_machine_s(run, work, churn, steady.round_s))
    longer = rented_s / machine_s
    return replace(
        steady,
        seconds=seconds,
        stretch=seconds / steady.seconds,
        sent_bytes=longer * steady.sent_bytes,
        computing=steady.computing / longer,
        dollars=None if steady.dollars is None else longer * steady.dollars,
    )


def _walked(fleet: Fleet, seed: int, machine_s: float, lost_s: float) -> tuple[float, float]:
    """Return when so many machine-seconds of work are done, and how many are rented until then."""
    there, now, done, rented = len(starters(fleet)), 0.0, 0.0, 0.0
    longest = HOPELESS * machine_s / fleet.size
    for event in happenings(fleet, seed):
        lasts = event.at_s - now
        if there and done + there * lasts >= machine_s:
            break
        done, rented, now = done + there * lasts, rented + there * lasts, event.at_s
        if now > longest:
            break
        if event.kind == "join":
            there += 1
        else:
            there, done = there - 1, done - lost_s
    if not there or now > longest:
        raise ConfigError("fleet.churn: machines are lost so often, or for so long, that the work is never done")
    rest = machine_s - done
    return now + rest / there, rented + rest


def _lost_machine_s(run: Run, work: Work, churn: Churn, round_s: float) -> float:
    """Return the machine-seconds that a loss takes: of those rented, what has not become useful at the usual pace."""
    small, _ = shrunk(run, work)
    rule = small.rule
    if isinstance(rule, DDP):
        rule = rule.model_copy(update={"buckets": Whole()})  # a loss costs the same, and there are fewer messages
    steps = min(ROUNDS * steps_of_a_round(rule), run.steps)
    calm = {"rule": rule, "steps": steps, "patience_s": patience_s(run, round_s), "leases": False}
    still = small.model_copy(update={**calm, "fleet": small.fleet.model_copy(update={"churn": None})})
    usual_s, useful, rented_s, _ = _rates(still)
    often_s = _losses_per_s(run.fleet, churn, run.seed)
    if not often_s:
        return 0.0
    faster = max(1.0, LOSSES / (usual_s * often_s))
    stormy = small.fleet.model_copy(update={"churn": _hastened(churn, faster)})
    _, left_useful, all_rented_s, losses = _rates(still.model_copy(update={"fleet": stormy}))
    return max(0.0, all_rented_s - left_useful * rented_s / useful) / losses if losses else 0.0


def _rates(run: Run) -> tuple[float, int, float, int]:
    """Return a run's seconds, useful samples, rented machine-seconds and losses."""
    outcome = simulate(run, timing_only=True)
    assert outcome.accounts is not None
    workers = outcome.accounts.workers
    losses = sum(left.reason not in ("finished", "stopped") for left in outcome.left())
    useful = sum(worker.useful_samples for worker in workers)
    return outcome.seconds, useful, math.fsum(worker.rented_s for worker in workers), losses


def _losses_per_s(fleet: Fleet, churn: Churn, seed: int) -> float:
    """Return how often the fleet loses a machine, as long as it has one to lose."""
    events = (event for event in churn.events(fleet.sites(), seed) if event.kind == "preempt")
    first = list(itertools.islice(events, COUNTED))
    return len(first) / first[-1].at_s if first else 0.0


def _hastened(churn: Churn, factor: float) -> Churn:
    """Return the same model in which everything happens so many times sooner."""
    if isinstance(churn, Trace):
        return churn.model_copy(update={"speed_up": factor * churn.speed_up})
    if isinstance(churn, Preemption | Exponential):
        sooner = churn.reacquire_s and churn.reacquire_s / factor
        return churn.model_copy(update={"rate_per_hour": factor * churn.rate_per_hour, "reacquire_s": sooner})
    return churn
