"""How much sooner than others a rule reaches targets, over several workloads: performance profiles and their area.

AlgoPerf, arXiv 2306.07179. Of the times t[w][s] that submission s takes on workload w to reach its target,

    r[w][s] = t[w][s] / min over s' of t[w][s'];   rho_s(tau) = share of the workloads with r[w][s] <= tau
    score_s = 1 / (r_max - 1) * integral of rho_s from 1 to r_max

"Time" may be any cost: seconds, bytes, samples. Scores depend on who else takes part, through the least time of each
workload, so the times themselves belong beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

R_MAX = 4.0
"""Whoever takes more than so many times the least time counts as not having reached the target."""
TAUS = np.linspace(1.0, R_MAX, 100)
"""Where profiles are evaluated; the area between them is a trapezoid's."""

Times = Mapping[str, Mapping[str, float]]
"""Workload -> submission -> time to the target. Missing, infinite or NaN: it was not reached."""


def median_time(times: Iterable[float]) -> float:
    """Return the median over seeds, infinite if half of them or more did not get there. Raises `ValueError` for none.

    Of an even number it is the mean of the middle two, which is infinite if one of them is.
    """
    known = sorted(math.inf if math.isnan(time) else time for time in times)
    if not known:
        raise ValueError("the median of no times")
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2


def profile(times: Times, submission: str) -> Sequence[float]:
    """Return rho of the submission at each of `TAUS`: the share of workloads that it does in tau least times or less.

    Raises `ValueError` if there are no workloads.
    """
    if not times:
        raise ValueError("a performance profile needs at least one workload")
    ratios = np.array([_ratio(of_workload, submission) for of_workload in times.values()])
    shares: list[float] = (ratios[:, None] <= TAUS).mean(axis=0).tolist()
    return shares


def score(times: Times, submission: str) -> float:
    """Return the area under the submission's profile, 0 to 1: 1 if it is the fastest on every workload."""
    shares = np.array(profile(times, submission))
    return float(((shares[1:] + shares[:-1]) / 2 * np.diff(TAUS)).sum() / (TAUS[-1] - TAUS[0]))


def _ratio(times: Mapping[str, float], submission: str) -> float:
    known = {name: time for name, time in times.items() if not math.isnan(time)}
    time, least = known.get(submission, math.inf), min(known.values(), default=math.inf)
    if math.isinf(time) or time > R_MAX * least:
        return math.inf
    return time / least if least else 1.0
