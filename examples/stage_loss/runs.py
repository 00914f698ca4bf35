"""The runs of the comparison: each way to recover, at each rate of losses, until it reaches the target loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from decentral.config import Run, read_run
from decentral.fleet.units import HOUR_S
from decentral.journal import Evaluated, Rebuilt, Record
from decentral.pipeline.recovery import CheckFree, CheckFreePlus, Copy, FromStart, Recovery, Redundant
from decentral.sim.simulate import simulate
from examples.stage_loss.losses import OneAtATime
from examples.stage_loss.replay import loss_after, replayed

Job = tuple[str, float, Run]
"""Way to recover, probability that a stage is lost within an hour, and the run."""

RUN_FILE = Path(__file__).parent / "run.toml"
TARGET = 2.34
"""Held-out loss in nats: what the run without losses (seed 0) comes to after 180 iterations, 75 % of 240."""
RATES = (0.05, 0.10, 0.16)
"""Probabilities that a stage is lost within an hour, as in the paper."""
CHECKPOINT_EVERY = 20
"""Iterations from one checkpoint to the next: the paper's 100, for five times as many losses come in each."""
BAMBOO = 151.04 / 91.35
"""How many times as long an iteration takes with redundant computation, as CheckFree's authors have measured it."""

NO_LOSSES = "no losses"
CHECKPOINTS = "checkpoints"
COMPUTATION = "redundant computation"
COPIES = "redundant copies"
PLUS = "checkfree_plus"
ALL_SIX = "checkfree_plus, all six"
WAYS: dict[str, tuple[Recovery, tuple[float, ...]]] = {
    NO_LOSSES: (CheckFree(), (0.0,)),
    COPIES: (Redundant(), (0.0, *RATES)),
    "checkfree": (CheckFree(), RATES),
    PLUS: (CheckFreePlus(), (0.0, *RATES)),
    ALL_SIX: (CheckFreePlus(), RATES),
    "uniform average": (CheckFree(exponent=0), RATES[-1:]),
    "copy": (Copy(), RATES[-1:]),
    "from_start": (FromStart(), RATES[-1:]),
}
"""How a lost stage is rebuilt in what is simulated, and the rates of losses."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to when the held-out loss reached the target, or at its end if it did not. Hours are virtual."""

    way: str
    rate: float
    seed: int
    reached: bool
    hours: float
    iterations: int
    """Iterations done, those that came to nothing among them."""
    losses: int | None
    """Stages that were lost and are back; None: however many, it does not matter."""
    curve: tuple[tuple[float, int, float], ...]
    """(hours, iterations that count, held-out loss in nats) at each evaluation."""


def runs(seed: int) -> list[Job]:
    """Return all that is simulated."""
    run = run_of(seed)
    return [(way, rate, recovering(run, way, rate)) for way, (_, rates) in WAYS.items() for rate in rates]


def run_of(seed: int, overrides: Sequence[str] = ()) -> Run:
    """Return the run file's run under that seed, with `overrides` as on the command line."""
    return read_run(RUN_FILE, [f"seed={seed}", "sim.processes=1", *overrides])


def recovering(run: Run, way: str, rate: float) -> Run:
    """Return the run with this way to recover and the probability that a stage is lost within an hour; 0: none is."""
    recovery, _ = WAYS[way]
    pipeline = run.pipeline.model_copy(update={"recovery": recovery})
    churn = churn_of(run).model_copy(update={"per_hour": rate, **({"spared": ()} if way == ALL_SIX else {})})
    fleet = run.fleet.model_copy(update={"churn": churn if rate else None})
    return run.model_copy(update={"pipeline": pipeline, "fleet": fleet})


def churn_of(run: Run) -> OneAtATime:
    """Return the run file's losses of stages."""
    churn = run.fleet.churn
    assert isinstance(churn, OneAtATime)
    return churn


def measure(way: str, rate: float, run: Run, target: float) -> Result:
    """Run until the held-out loss, nats, is no higher than `target`, or to the end."""

    def reached(record: Record) -> bool:
        return isinstance(record, Evaluated) and record.metrics["loss"] <= target

    outcome = simulate(run, until=reached)
    seen = outcome.evaluations()
    return Result(
        way=way,
        rate=rate,
        seed=run.seed,
        reached=reached(seen[-1]),
        hours=outcome.seconds / HOUR_S,
        iterations=seen[-1].step,
        losses=sum(isinstance(record, Rebuilt) for record in outcome.records),
        curve=tuple((record.time_s / HOUR_S, record.step, record.metrics["loss"]) for record in seen),
    )


def replays(quiet: Result) -> list[Result]:
    """Return what takes no training of its own, told from a run without losses to the target.

    With checkpoints the same losses come as in what is simulated. With redundant computation each iteration takes
    `BAMBOO` times as long, and none is lost.
    """
    run = run_of(quiet.seed)
    return [
        *(with_checkpoints(quiet, rate, churn_of(recovering(run, NO_LOSSES, rate)), run.fleet.size) for rate in RATES),
        *(with_computation(quiet, rate) for rate in RATES),
    ]


def with_checkpoints(quiet: Result, rate: float, churn: OneAtATime, workers: int) -> Result:
    """Return a run that goes back to the newest checkpoint at each loss, and ends where `quiet` does."""
    lost_at_s = (event.at_s for event in churn.events([None] * workers, quiet.seed) if event.kind == "preempt")
    iteration_s, points = HOUR_S * quiet.hours / quiet.iterations, [(0.0, 0, 0)]
    for point in replayed(lost_at_s, iteration_s, CHECKPOINT_EVERY, churn.restart_s):
        points.append(point)
        if point[1] == quiet.iterations:
            break
    return replace(
        quiet,
        way=CHECKPOINTS,
        rate=rate,
        hours=points[-1][0] / HOUR_S,
        iterations=len(points) - 1,
        losses=points[-1][2],
        curve=tuple((end_s / HOUR_S, counted, loss_after(quiet.curve, counted)) for end_s, counted, _ in points),
    )


def with_computation(quiet: Result, rate: float) -> Result:
    """Return a run with the same curve in iterations, each of which takes `BAMBOO` times as long."""
    curve = tuple((BAMBOO * hours, iterations, loss) for hours, iterations, loss in quiet.curve)
    return replace(quiet, way=COMPUTATION, rate=rate, hours=BAMBOO * quiet.hours, losses=None, curve=curve)
