"""Charts: a frame with two axes, and what stands in it. Each is a `Drawing`; none knows what a run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from decentral.report.page.drawing import Anchor, Area, Drawing, Line, Marks, Point, Shape, Words
from decentral.report.page.words import axis_text, log_ticks, ticks, time_unit

WIDTH, HEIGHT = 380.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 14.0, 14.0, 38.0
"""Margins of a frame, for the values and names of its axes."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: what it is of, its bounds, and how its values are written, in its unit's numbers.

    `log`: equal ratios are equally long. `whole`: its values number things, and stand below the middle of each.
    """

    label: str
    low: float
    high: float
    text: Callable[[float], str]
    unit: float = 1.0
    log: bool = False
    whole: bool = False

    def share(self, value: float) -> float:
        """Return how far along the axis a value lies, 0 to 1."""
        if self.high <= self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int = 5) -> list[float]:
        if self.log:
            return log_ticks(self.low, self.high)
        if self.whole:
            step = max(1, -(-round(self.high) // 12))
            return [float(place) for place in range(0, round(self.high), step)]
        return [tick * self.unit for tick in ticks(self.low / self.unit, self.high / self.unit, wanted)]


def axis(kind: str, label: str, high: float, low: float = 0.0, *, log: bool = False) -> Axis:
    """Return an axis of samples, time (seconds), bytes or dollars, with a little room at its upper end."""
    unit, name = time_unit(high) if kind == "time" else (1.0, "")
    write = axis_text(kind)
    room = high * 1.3 if log else high + 0.02 * (high - low)
    below = low / 1.3 if log else low
    return Axis(f"{label} ({name})" if name else label, below, room, lambda value: write(value / unit), unit, log)


def value_axis(label: str, values: Iterable[float]) -> Axis:
    """Return an axis that the values fill, with a little room on either side."""
    known = list(values)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(label, low - room, high + room, lambda value: f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class Series:
    """Values in order: a line (if `joined`) with marks (if they have a `shape`), and a star where it all ends.

    `band` is how far the values may be off on either side, `hints` what is said of each mark.
    """

    points: Sequence[Point]
    colour: str
    dash: Sequence[float] = ()
    shape: Shape | None = None
    joined: bool = True
    band: Sequence[float] = ()
    star: Point | None = None
    size: float = 2.6
    hints: Sequence[str] = ()


class Frame:
    """A chart's two axes, and the way from values to places on the paper."""

    def __init__(self, across: Axis, up: Axis) -> None:
        self.drawing = Drawing(WIDTH, HEIGHT)
        self._across, self._up = across, up
        self._right, self._bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        self._draw_axes()

    def at(self, point: Point) -> Point:
        """Return where on the paper the values are."""
        x = LEFT + self._across.share(point[0]) * (self._right - LEFT)
        return x, self._bottom - self._up.share(point[1]) * (self._bottom - TOP)

    def add(self, series: Series) -> None:
        """Draw a line, its band, its marks and its star."""
        places = [self.at(point) for point in series.points]
        if series.band:
            above = [self.at((x, y + more)) for (x, y), more in zip(series.points, series.band, strict=True)]
            below = [self.at((x, y - more)) for (x, y), more in zip(series.points, series.band, strict=True)]
            self.drawing.add(Area([[*above, *reversed(below)]], series.colour, 0.2))
        if series.joined and len(places) > 1:
            self.drawing.add(Line(places, series.colour, dash=series.dash))
        if series.shape or len(places) == 1:
            self.drawing.add(Marks(places, series.shape or "circle", series.colour, series.size, series.hints))
        if series.star:
            self.drawing.add(Marks([self.at(series.star)], "star", series.colour, 4.5))

    def add_columns(self, edges: Sequence[float], stacks: Sequence[tuple[str, Sequence[float]]]) -> None:
        """Draw columns between the edges: one stack of values for each, the first at the bottom."""
        floors = [0.0] * (len(edges) - 1)
        for colour, values in stacks:
            tops = [floor + value for floor, value in zip(floors, values, strict=True)]
            outlines = []
            for since, until, floor, top in zip(edges, edges[1:], floors, tops, strict=False):
                if top > floor:
                    (left, low), (right, high) = self.at((since, floor)), self.at((until, top))
                    outlines.append([(left, low), (left, high), (right, high), (right, low)])
            self.drawing.add(Area(outlines, colour))
            floors = tops

    def _draw_axes(self) -> None:
        draw = self.drawing.add
        for tick in self._up.ticks(4):
            _, y = self.at((self._across.low, tick))
            draw(Line([(LEFT, y), (self._right, y)], "rule", 1.0))
            draw(Words((LEFT - 6, y + 4), self._up.text(tick), "end"))
        draw(Line([(LEFT, self._bottom), (self._right, self._bottom)], "muted", 1.0))
        last = -math.inf
        for tick in self._across.ticks():
            x, _ = self.at((tick + 0.5 * self._across.whole, self._up.low))
            text = self._across.text(tick)
            half = 3.4 * len(text)
            if x - half < last + 6:
                continue
            draw(Line([(x, self._bottom), (x, self._bottom + 4)], "muted", 1.0))
            over = x + half > self._right + RIGHT
            anchor: Anchor = "end" if over else "middle"
            draw(Words((self._right + RIGHT if over else x, self._bottom + 16), text, anchor))
            last = x + half
        draw(Words(((LEFT + self._right) / 2, HEIGHT - 5), self._across.label, "middle"))
        if self._up.label:
            draw(Words((LEFT, TOP - 3), self._up.label, "start", "muted", 11.0))


def front(points: Sequence[Point], higher_is_better: bool) -> list[int]:
    """Return which points (cost, value) no other one beats: none costs as little and is as good. Ascending by cost."""
    found: list[int] = []
    sign = -1.0 if higher_is_better else 1.0
    for index in sorted(range(len(points)), key=lambda place: (points[place][0], sign * points[place][1])):
        if not found or sign * points[index][1] < sign * points[found[-1]][1]:
            found.append(index)
    return found
