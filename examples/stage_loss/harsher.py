"""As many losses on the way to the target as in the paper: `python -m examples.stage_loss --harsher`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from examples.stage_loss.paper import losses, relative_iterations
from examples.stage_loss.runs import NO_LOSSES, PLUS, RATES, Job, Result, churn_of, recovering, run_of

CLOCK = ("fleet.churn.speed_up=80", "fleet.churn.apart_s=100")
"""The clock of losses. At h an hour, -ln(1 - h) T of each stage come in T hours. The paper's 367.81 h at 5 % are our
4.6 h to the target, so that hours of losses must pass 80 times as fast for as many to come on the way."""
RATES_OF: dict[str, tuple[float, ...]] = {
    NO_LOSSES: (0.0,),
    "checkfree": RATES,
    PLUS: (0.0, *RATES),
    "uniform average": RATES[-1:],
    "copy": RATES[-1:],
    "from_start": RATES[-1:],
}


def runs(seed: int) -> list[Job]:
    """Return all that is simulated."""
    run = run_of(seed, CLOCK)
    return [(way, rate, recovering(run, way, rate)) for way, rates in RATES_OF.items() for rate in rates]


def iterations_table(results: Sequence[Result]) -> Table:
    """Return a row for each way and rate, with means over seeds; iterations relative to those of `NO_LOSSES`."""
    churn = churn_of(run_of(0))
    table = Table(title="iterations to the target, with as many losses as in the paper; >: not reached")
    table.add_column("way to recover")
    for column in ("lost an hour", "losses", "the paper's", "iterations", "relative", "the paper's"):
        table.add_column(column, justify="right")
    quiet = fmean(result.iterations for result in results if result.way == NO_LOSSES)
    for way, rate in dict.fromkeys((result.way, result.rate) for result in results):
        found = [result for result in results if (result.way, result.rate) == (way, rate)]
        beyond = "" if all(result.reached for result in found) else "> "
        expected, paper = losses(way, rate, churn.stages - len(churn.spared)), relative_iterations(way, rate)
        table.add_row(
            way,
            f"{rate:.0%}",
            f"{fmean(result.losses or 0 for result in found):g}",
            "" if expected is None else f"{expected:.0f}",
            f"{beyond}{fmean(result.iterations for result in found):g}",
            f"{beyond}{fmean(result.iterations for result in found) / quiet:.2f}",
            "" if paper is None else f"{paper:.2f}",
        )
    return table
