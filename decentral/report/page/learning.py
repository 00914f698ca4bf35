"""Figures of what was learned: held-out metric, training loss, the spread of the replicas, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt

from decentral.report.page.charts import Axis, Frame, Series, axis, front, value_axis
from decentral.report.page.course import Course, Held
from decentral.report.page.figure import Cells, Figure, Key, Look, along, axes_of, look, place_text
from decentral.report.page.words import duration_text, short_count, value_text
from decentral.sketch import NUMBERS

MEAN_DASH = (2.0, 3.0)


@dataclass(frozen=True, slots=True)
class _Line:
    """Evaluations that belong together, and how they look."""

    name: str
    course: Course
    held: list[Held]
    omitted: list[Held]
    look: Look
    ends_in_star: bool

    def series(self, kind: str) -> Series:
        points = [(along(each.place, kind), each.value) for each in self.held]
        hints = [f"{self.name}: {value_text(each.value)} after {duration_text(each.place.time)}" for each in self.held]
        # Where workers take turns, theirs are models of their own, and none went from here to there.
        turns = sum(before.worker != after.worker for before, after in pairwise(self.held))
        joined = turns <= len(self.held) / 4
        star = (along(self.course.end, kind), self.end) if self.end is not None else None
        colour, dash, shape = self.look.colour, self.look.dash, self.look.shape
        return Series(points, colour, dash, shape, joined, star=star, hints=hints)

    @property
    def end(self) -> float | None:
        """What the merged model came to."""
        return self.course.read.after if self.ends_in_star and self.course.read.finished else None


def held_out(courses: Sequence[Course]) -> Figure | None:
    """Return the held-out metric along each axis; None if nobody has evaluated after the start."""
    lines = [line for index, course in enumerate(courses) for line in _lines(course, look(index), len(courses) == 1)]
    if not lines:
        return None
    headline, axes = courses[0].read.headline, axes_of(courses)
    values = [each.value for line in lines for each in line.held] + [line.end for line in lines if line.end is not None]
    up = value_axis("", values)
    drawings = {}
    for kind, label in axes.items():
        frame = Frame(_axis(courses, kind, label), up)
        for line in lines:
            frame.add(line.series(kind))
        drawings[kind] = frame.drawing
    caption = f"{'Higher' if courses[0].read.higher_is_better else 'Lower'} is better."
    if any(line.end is not None for line in lines):
        caption += " Star: the merged model at the end."
    above = [each.value for line in lines for each in line.omitted]
    outside = above + [course.read.before for course in courses if course.read.before is not None]
    if outside:
        caption += f" Outside the picture, at the start: {_span(outside)}."
    return Figure(
        "held-out",
        f"Held-out {headline}",
        caption,
        f"Held-out {headline}: " + "; ".join(_from_to(course) for course in courses) + ".",
        drawings,
        [Key("line", line.look.colour, line.name, line.look.dash) for line in lines] if len(lines) > 1 else (),
        _table(courses, headline),
    )


def training_loss(courses: Sequence[Course]) -> Figure | None:
    """Return the training loss along each axis, with its deviation if the run is alone; None without any loss."""
    found = [(look(index), course) for index, course in enumerate(courses) if course.losses]
    if not found:
        return None
    alone, axes = len(courses) == 1, axes_of(courses)
    shown = [course.losses[_start_of([loss.mean for loss in course.losses]) :] for _, course in found]
    deviations = [[loss.deviation if alone else 0.0 for loss in losses] for losses in shown]
    ends = [
        loss.mean + sign * deviation
        for losses, around in zip(shown, deviations, strict=True)
        for loss, deviation in zip(losses, around, strict=True)
        for sign in (-1, 1)
    ]
    drawings = {}
    for kind, label in axes.items():
        frame = Frame(_axis(courses, kind, label), value_axis("", ends))
        for (style, _), losses, around in zip(found, shown, deviations, strict=True):
            points = [(along(loss.place, kind), loss.mean) for loss in losses]
            frame.add(Series(points, style.colour, style.dash, band=around if alone else ()))
        drawings[kind] = frame.drawing
    caption = "Mean over workers and local steps, in equal bins of time."
    if alone:
        caption += " Band: a standard deviation within a bin."
    hidden = [loss.mean for (_, course), kept in zip(found, shown, strict=True) for loss in course.losses[: -len(kept)]]
    if hidden:
        caption += f" Outside the picture, at the start: {_span(hidden)}."
    ways = [
        f"{course.read.name} from {course.losses[0].mean:.4g} to {course.losses[-1].mean:.4g}" for _, course in found
    ]
    return Figure(
        "training-loss",
        "Training loss",
        caption,
        f"Training loss: {'; '.join(ways)}.",
        drawings,
        () if alone else [Key("line", style.colour, course.read.name, style.dash) for style, course in found],
        _loss_table(found[0][1], axes) if alone else None,
    )


def spread(course: Course) -> Figure | None:
    """Return how far replicas lie apart over time; None if they never do.

    Their parameters, or without sketches of them their training losses within bins of time.
    """
    sketched = bool(course.apart)
    if sketched:
        points = [(each.time_s, each.distance) for each in course.apart]
        of, unit = "Distance of the replicas' parameters to their mean", "distance"
        caption = (
            f"Root mean square distance of parameters to their mean, by its norm, before the replicas meet: estimated "
            f"from {NUMBERS} numbers of each, within about {1 / sqrt(2 * NUMBERS):.0%}."
        )
    else:
        points = [(loss.place.time, loss.deviation) for loss in course.losses if loss.deviation > 0]
        of, unit = "Standard deviation of training losses", "deviation"
        caption = "Standard deviation of the training losses within a bin: workers and steps differ by so much."
    most = max((value for _, value in points), default=0.0)
    if not most:
        return None
    up = Axis("", 0.0, 1.06 * most, lambda value: f"{value:.3g}")
    frame = Frame(_axis([course], "time", axes_of([course])["time"]), up)
    frame.add(Series(points, "one"))
    values = {held.step: held.value for held in course.held}
    both = [(values[mean.step], mean.value) for mean in course.means if mean.step in values]
    if both:
        caption += (
            f" Held out, last: a worker {value_text(both[-1][0])}, the mean of workers {value_text(both[-1][1])}."
        )
    rows = [(duration_text(time_s), f"{value:.4g}") for time_s, value in points]
    label = f"{of} over time: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at the end."
    return Figure(
        "spread", "Spread of the replicas", caption, label, {"": frame.drawing}, (), Cells(["until", unit], rows)
    )


def fronts(courses: Sequence[Course]) -> list[Figure]:
    """Return what each run came to by what it took, along each axis, and the front of those that none beats in both."""
    ended = [(look(index), course) for index, course in enumerate(courses) if course.read.after is not None]
    if len(ended) < 2:
        return []
    return [
        _front(ended, courses, kind, label)
        for kind, label in axes_of(courses).items()
        if kind != "samples"  # of which all have about as many
    ]


def _front(ended: list[tuple[Look, Course]], courses: Sequence[Course], kind: str, label: str) -> Figure:
    read = courses[0].read
    points = [(along(course.end, kind), course.read.after or 0.0) for _, course in ended]
    best = front(points, read.higher_is_better)
    names = ", ".join(ended[place][1].read.name for place in best)
    costs = [cost for cost, _ in points]
    wide = min(costs) > 0 and max(costs) > 20 * min(costs)
    frame = Frame(
        axis(kind, label, max(costs), min(costs) if wide else 0.0, log=wide), value_axis("", [y for _, y in points])
    )
    if len(best) > 1:
        frame.add(Series([points[place] for place in best], "muted", (4, 3)))
    rows = []
    for place, (style, course) in enumerate(ended):
        cost, value = place_text(course.end, kind), value_text(points[place][1])
        hint = f"{course.read.name}: {value} at {cost}"
        frame.add(Series([points[place]], style.colour, (), style.shape, False, size=5.0, hints=[hint]))
        rows.append((course.read.name, cost, value, "yes" if place in best else "no"))
    return Figure(
        f"front-{kind}",
        f"{read.headline} by {label}",
        f"At the end of each run. On the front, where none is better in both: {names}.",
        f"Held-out {read.headline} by {label} at the end of each run; on the front: {names}.",
        {"": frame.drawing},
        [Key(style.shape, style.colour, course.read.name) for style, course in ended],
        Cells(["run", label, read.headline, "on the front"], rows, frozenset({0, 3})),
    )


def _lines(course: Course, style: Look, alone: bool) -> list[_Line]:
    name = "evaluated worker" if alone else course.read.name
    means = "mean of workers" if alone else f"{course.read.name}, mean of workers"
    found = []
    for called, looks, how, star in (
        (name, course.held, style, True),
        (means, course.means, Look(style.colour, MEAN_DASH, "diamond"), False),
    ):
        held = [each for each in looks if each.step and isfinite(each.value)]
        if held:
            first = _start_of([each.value for each in held])
            found.append(_Line(called, course, held[first:], held[:first], how, star))
    return found


def _axis(courses: Sequence[Course], kind: str, label: str) -> Axis:
    return axis(kind, label, max(along(course.end, kind) for course in courses))


def _start_of(values: Sequence[float]) -> int:
    """Return how many of the first values to leave out: a fall, or rise, that would take half of the picture."""
    low, high = min(values), max(values)
    for skipped in range(max(1, len(values) // 8)):
        rest = values[skipped:]
        if high - low <= 2 * (max(rest) - min(rest)):
            continue
        return skipped
    return 0


def _from_to(course: Course) -> str:
    return f"{course.read.name} from {value_text(course.read.before)} to {value_text(course.read.after)}"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return value_text(low) if value_text(low) == value_text(high) else f"{value_text(low)} to {value_text(high)}"


def _table(courses: Sequence[Course], headline: str) -> Cells:
    axes = axes_of(courses)
    rows = []
    for course in courses:
        for what, looks in (("", course.held), ("mean of workers", course.means)):
            for each in looks:
                whose = [course.read.name] * (len(courses) > 1) + [what or f"worker {each.worker}", str(each.step)]
                rows.append((*whose, *(place_text(each.place, kind) for kind in axes), value_text(each.value)))
    head = [*["run"] * (len(courses) > 1), "model", "step", *axes.values(), headline]
    return Cells(head, rows, frozenset({0, 1} if len(courses) > 1 else {0}))


def _loss_table(course: Course, axes: dict[str, str]) -> Cells:
    rows = [
        (
            *(place_text(each.place, kind) for kind in axes),
            short_count(each.steps),
            f"{each.mean:.5g}",
            f"{each.deviation:.3g}",
        )
        for each in course.losses
    ]
    return Cells([f"{name}, until" for name in axes.values()] + ["local steps", "loss", "deviation"], rows, frozenset())
