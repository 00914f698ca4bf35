"""How much it took a run to become good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

from decentral.report.curves import MEASURES, Curve


def default_target(finals: Sequence[float], higher_is_better: bool) -> float:
    """Return the median of the baseline's final values, of an even number the worse of the middle two.

    So at least half of the baseline's own runs reach it. Those that are NaN count as worst. Raises `ValueError` for
    none.
    """
    if not finals:
        raise ValueError("a target needs at least one final value")
    worst = -math.inf if higher_is_better else math.inf
    from_best = sorted((worst if math.isnan(value) else value for value in finals), reverse=higher_is_better)
    return from_best[len(from_best) // 2]


def used_up_to(curve: Curve | None, target: float, higher_is_better: bool) -> dict[str, float | None]:
    """Return what the run had used up at its first evaluation that was as good as the target, by measure.

    Infinite if none was, the merged model's at the end included, or if there is no curve since the run diverged. None
    for dollars if prices are not known.
    """
    if curve is None:
        return dict.fromkeys(MEASURES, math.inf)
    for point in (*curve.points, curve.end):
        if point.value >= target if higher_is_better else point.value <= target:
            return {measure: getattr(point, measure) for measure in MEASURES}
    used: dict[str, float | None] = dict.fromkeys(MEASURES, math.inf)
    return used if curve.end.dollars is not None else {**used, "dollars": None}
