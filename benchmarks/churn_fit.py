"""How well the model of correlated preemption fits real traces, and how badly independent churn does.

Run from the repository's root (seconds):

    python -m benchmarks.churn_fit

For each built-in trace: the model's parameters as fitted, then the figures of the trace beside those of fresh traces
that the fitted model, and independent exponential churn of the same rate, draw for as many machines and as long a time
(median and the range of nine tenths, over seeds). A group is what is lost in one minute: the traces' clocks are no
finer, so independent losses make groups by chance. The A100 trace counts machines and does not name them: it has no
lives, and what it lost between two samples counts as a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from decentral.fleet.churn import Churn, Exponential
from decentral.fleet.fit import Losses, drawn, fit, losses_of
from decentral.fleet.traces import TRACES, Change, read_trace
from decentral.fleet.units import HOUR_S

SEEDS = 200
CLOCK_S = 60.0
"""What traces are logged by: losses in the same minute look like a group."""
LIFE_QUANTILES = (10, 25, 50, 75, 90)


def figures(losses: Losses) -> dict[str, float]:
    """Return what is compared, by its name in the table; lives only where they are known."""
    lives = {
        f"life, {percent} % quantile, hours": float(np.percentile(losses.lives_s, percent)) / HOUR_S
        for percent in (LIFE_QUANTILES if losses.lives_s else ())
    }
    return {
        "losses per machine-hour": losses.rate_per_hour,
        "share lost in groups": losses.group_share,
        "mean group": losses.group_mean,
        "largest group": losses.largest_group,
        "place empty, hours": losses.vacancy_s / HOUR_S,
        **lives,
    }


def most(changes: Sequence[Change]) -> int:
    """Return how many machines a trace has at most."""
    return max(accumulate(1 if change.came else -1 for change in changes))


def spread(churn: Churn, changes: Sequence[Change]) -> dict[str, str]:
    """Return the median of each figure over fresh traces, and the range that nine tenths of them are in."""
    fresh = []
    for seed in range(SEEDS):
        exact = drawn(churn, most(changes), seed, changes[-1].at_s)
        fresh.append(figures(losses_of([change._replace(at_s=change.at_s // CLOCK_S * CLOCK_S) for change in exact])))
    told = {}
    for name in fresh[0]:
        low, middle, high = np.percentile([each[name] for each in fresh], [5, 50, 95])
        told[name] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return told


def main() -> None:
    """Print a table for each trace."""
    for source in TRACES:
        changes = read_trace(source)
        model = fit(changes)
        alone = Exponential(rate_per_hour=model.rate_per_hour, reacquire_s=model.reacquire_s)
        print(
            f"{source}: {most(changes)} machines, {changes[-1].at_s / HOUR_S:.1f} h; fitted: preemption with "
            f"rate_per_hour = {model.rate_per_hour:.3f}, group_mean = {model.group_mean:.2f}, "
            f"reacquire_s = {model.reacquire_s:.0f}"
        )
        print(f"  {'':<30}{'trace':>8}{'model':>26}{'independent':>26}")
        grouped, single = spread(model, changes), spread(alone, changes)
        for name, found in figures(losses_of(changes)).items():
            print(f"  {name:<30}{found:>8.2f}{grouped[name]:>26}{single[name]:>26}")
        print(flush=True)


if __name__ == "__main__":
    main()
