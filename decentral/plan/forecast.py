"""What a run will take: its first rounds simulated, the others as the last of these."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.plan.shrink import shrunk
from decentral.plan.work import Work
from decentral.protocols import DDP, RULES, Every, HierarchicalDiLoCo, SyncRule
from decentral.protocols.rounds import AllReduceRule
from decentral.sim.simulate import simulate

ALONE = (0, 1)
"""Rounds before the steady state, and rounds that are simulated, where each round begins with everybody at rest."""
FLOWING = (2, 4)
"""The same where what one round sends may arrive in the next."""
DRAWN = (4, 36)
"""The same where partners are drawn: the rounds between are what the others take on average."""
STEPS = 64
"""Local steps, at least, over whose chances is averaged where steps or messages jitter."""
ENDLESS_S = 1e9
"""Patience that does not end: where nobody goes, whoever waits waits for what will come."""
ROOM = 2
"""Rounds for which a worker of a planned run waits for another one before it goes on without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will come to."""

    seconds: float
    round_s: float
    """Seconds of a round: local steps and what follows them."""
    sent_bytes: float
    """By all workers together."""
    computing: float
    """Share of the rented time in which machines compute."""
    dollars: float | None
    """Machines, and traffic between sites where its price is known; None if nobody says what a machine costs."""
    stretch: float = 1.0
    """How many times as long it takes as with all machines there all the time."""


def forecast(run: Run, work: Work) -> Forecast:
    """Return what the whole run will take. Raises `ConfigError` as `simulate` does.

    A run whose rounds are alike from some round a on takes T(n) = T(a) + (n - a) (T(b) - T(a)) / (b - a) for n rounds,
    and so do its bytes and dollars; T(a) and T(b) are simulated, with the run's own last, shorter phase at their ends.
    Where chance has a part, a and b are further apart. A short run is simulated whole.
    """
    small, share = shrunk(run, work)
    small = small.model_copy(update={"patience_s": ENDLESS_S})
    unit = steps_of_a_round(run.rule)
    rounds, rest = divmod(run.steps, unit)
    first, last = _simulated(run)
    if rounds <= last:
        figures = _figures(small, run.steps)
        round_s = figures[0] / math.ceil(run.steps / unit)
    else:
        begun, ended = (_figures(small, count * unit + rest) for count in (first, last))
        each = (ended - begun) / (last - first)
        figures = begun + (rounds - first) * each
        round_s = each[0]
    seconds, sent_bytes, compute_s, rented_s, dollars, egress = figures.tolist()
    return Forecast(
        seconds=seconds,
        round_s=float(round_s),
        sent_bytes=sent_bytes / share,
        computing=compute_s / rented_s,
        dollars=None if math.isnan(dollars) else dollars + (0.0 if math.isnan(egress) else egress / share),
    )


def patience_s(run: Run, round_s: float) -> float:
    """Return how long workers of a planned run wait for each other: as the file says, or `ROOM` rounds if longer."""
    return max(run.patience_s, ROOM * round_s)


def steps_of_a_round(rule: SyncRule) -> int:
    """Return the local steps after which a rule's rounds begin anew. Raises `ConfigError` if their number changes."""
    if isinstance(rule, DDP):
        return 1
    period = getattr(rule, "period", 1)
    if isinstance(period, Every):
        period = period.period
    if not isinstance(period, int):
        raise ConfigError(f"rule.period: a plan is for phases of one length; give a number, not '{period.spelling()}'")
    return period * rule.rounds if isinstance(rule, HierarchicalDiLoCo) else period


def _simulated(run: Run) -> tuple[int, int]:
    """Return after how many rounds the steady state begins, and how many are simulated."""
    fleet = run.fleet
    if not isinstance(run.rule, AllReduceRule):
        return DRAWN
    alone = run.rule.reductions() is not None and type(run.rule) in RULES.values()  # others may run differently
    first, last = ALONE if alone else FLOWING
    if fleet.jitter or any(group.jitter for group in fleet.workers) or _messages_jitter(fleet):
        rounds = math.ceil(STEPS / steps_of_a_round(run.rule))
        last = first + min(max(rounds, FLOWING[1]), DRAWN[1])
    return first, last


def _messages_jitter(fleet: Fleet) -> bool:
    routes = fleet.network.routes(fleet.sites(), fleet.latency_s)
    return any(route.jitter_s or route.loss for route in routes.values())


def _figures(run: Run, steps: int) -> NDArray[np.float64]:
    """Return what so many local steps take: seconds, bytes, seconds computed and rented, dollars, those of egress.

    What is unknown is nan.
    """
    if not steps:
        return np.zeros(6)
    accounts = simulate(run.model_copy(update={"steps": steps}), timing_only=True).accounts
    assert accounts is not None
    workers = accounts.workers
    figures = (
        accounts.seconds,
        sum(worker.sent_bytes for worker in workers),
        sum(worker.compute_s for worker in workers),
        sum(worker.rented_s for worker in workers),
        accounts.dollars,
        accounts.egress_dollars,
    )
    return np.array([math.nan if figure is None else figure for figure in figures])
