"""Numbers for people: times, sizes, counts and money, each with its unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from decentral.report.summary import dollars_text, size_text

TIMES = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


def duration_text(seconds: float) -> str:
    """Return a time in the two largest units that say something: "2 h 5 min", "41.0 s"."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms" if seconds else "0 s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def short_count(value: float) -> str:
    """Return a count with a thousand, million or milliard cut to a letter: "12.5k"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def value_text(value: float | None) -> str:
    """Return a metric to four digits; a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers with runs of them drawn together: "0-4, 6"."""
    runs: list[list[int]] = []
    for each in sorted(numbers):
        if runs and each == runs[-1][-1] + 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "nobody"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit in which an axis up to so many seconds is best read: its seconds and its name."""
    return next(((size, name) for size, name in TIMES if seconds >= 2 * size), TIMES[-1])


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers within the bounds, about as many as wanted, evenly spaced by 1, 2, 2.5 or 5 x 10^n."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * each for each in (1, 2, 2.5, 5, 10) if size * each >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within the bounds, with 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for between in ((1,), (1, 3), (1, 2, 5)):
        found = [digit * 10.0**power for power in decades for digit in between]
        inside = [each for each in found if low * 0.999 <= each <= high * 1.001]
        if len(inside) >= 3:
            return inside
    return inside


def axis_text(kind: str) -> Callable[[float], str]:
    """Return how the values of an axis of that kind are written; those of time are bare numbers."""
    return {"bytes": size_text, "dollars": dollars_text, "samples": short_count}.get(kind, lambda value: f"{value:.6g}")
