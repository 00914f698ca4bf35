"""The timeline of a run: a lane for each worker, or for a few, in which every column is a bin of time.

The height of a colour is its share of the bin's time, so a bin loses nothing but the order of what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from decentral.report.page.charts import Axis
from decentral.report.page.course import Course
from decentral.report.page.drawing import HATCH, Area, Drawing, Line, Marks, Point, Words

LANE, THIN_LANE, GAP, TOP, BOTTOM = 15.0, 10.0, 3.0, 6.0, 38.0
LEFT, RIGHT = 44.0, 14.0
MANY = 32
"""Lanes from which on they are thin, and every fourth has a name."""

ACTIVITIES = {"compute": ("compute", "evaluate"), "talk": ("talk",), "wait": ("wait",)}
"""What is drawn, and the activities of the journal that it is made of. Evaluating is computing."""


@dataclass(frozen=True, slots=True)
class Lane:
    """A worker, or some, with shares of each column's time, 0 to 1: of what was done, of being there, of being down.

    Where nobody has told talking from waiting, `busy` has no "talk". `came` and `gone` are times: of comings after the
    start, and of losses.
    """

    name: str
    busy: dict[str, list[float]]
    present: list[float]
    lost: list[float]
    came: list[float]
    gone: list[float]


@dataclass(frozen=True, slots=True)
class Lanes:
    """All lanes of a run, and the edges of their columns in seconds."""

    edges: list[float]
    lanes: list[Lane]

    @property
    def came(self) -> int:
        return sum(len(lane.came) for lane in self.lanes)

    @property
    def gone(self) -> int:
        return sum(len(lane.gone) for lane in self.lanes)

    @property
    def tells_talking(self) -> bool:
        """Whether talking is told from waiting."""
        return all("talk" in lane.busy for lane in self.lanes)


def lanes_of(course: Course, most: int) -> Lanes:
    """Return the lanes of a run with at most so many columns."""
    history = course.read.history
    crews: dict[int, list[int]] = {}
    for worker in sorted(history.workers):
        crews.setdefault(history.row(worker), []).append(worker)
    edges = course.columns(most)
    return Lanes(edges, [_lane(course, row, crew, edges, most) for row, crew in crews.items()])


def _lane(course: Course, row: int, crew: list[int], edges: list[float], most: int) -> Lane:
    history = course.read.history
    whole = [(until - since) * len(crew) for since, until in pairwise(edges)]
    source = "metered" if history.source == "accounts" else history.source
    told = {"compute": ACTIVITIES["compute"]} if source == "trained" else ACTIVITIES
    stays = [stay for worker in crew for stay in history.workers[worker].presence(history.end_s)]
    away = [span for worker in crew for span in history.workers[worker].absences(history.end_s)]

    def shares(seconds: Iterable[float]) -> list[float]:
        return [min(1.0, each / of) for each, of in zip(seconds, whole, strict=True)]

    def done(activities: Sequence[str]) -> list[float]:
        columns = [course.per_column((source, activity, row), most) for activity in activities]
        return shares(map(sum, zip(*columns, strict=True)))

    return Lane(
        name=str(crew[0]) if len(crew) == 1 else f"{crew[0]}-{crew[-1]}",
        busy={name: done(activities) for name, activities in told.items()},
        present=shares(_covered(edges, [(stay.since_s, stay.until_s) for stay in stays])),
        lost=shares(_covered(edges, away)),
        came=[stay.since_s for stay in stays if stay.since_s > 0],
        gone=[since for since, _ in away],
    )


def draw_lanes(lanes: Lanes, across: Axis, width: float) -> Drawing:
    """Draw the lanes below each other over one axis of time."""
    lane_height = LANE if len(lanes.lanes) <= MANY else THIN_LANE
    height = TOP + len(lanes.lanes) * (lane_height + GAP) + BOTTOM
    drawing = Drawing(width, height)
    right, floor = width - RIGHT, height - BOTTOM

    def x(time_s: float) -> float:
        return LEFT + across.share(time_s) * (right - LEFT)

    for tick in across.ticks(10 if width > 600 else 5):
        drawing.add(Line([(x(tick), TOP), (x(tick), floor + 4)], "rule", 1.0))
        drawing.add(Words((x(tick), floor + 16), across.text(tick), "middle"))
    drawing.add(Words(((LEFT + right) / 2, height - 5), across.label, "middle"))
    edges = [x(edge) for edge in lanes.edges]
    came: list[Point] = []
    gone: list[Point] = []
    for place, lane in enumerate(lanes.lanes):
        base = TOP + place * (lane_height + GAP) + lane_height
        if len(lanes.lanes) <= MANY or place % 4 == 0:
            drawing.add(Words((LEFT - 6, base - 2), lane.name, "end", size=min(12.0, lane_height)))
        for colour, heights in _layers(lane):
            drawing.add(Area(_steps(edges, heights, base, lane_height), colour))
        came += [(x(time_s), base - lane_height / 2) for time_s in lane.came]
        gone += [(x(time_s), base - lane_height / 2) for time_s in lane.gone]
    drawing.add(Marks(gone, "cross", "lost", 4.0), Marks(came, "triangle", "three", 4.0))
    return drawing


def _layers(lane: Lane) -> list[tuple[str, list[float]]]:
    """Return colours and heights to be painted over each other: what is left of a lower one is what it stands for."""
    compute, talk = lane.busy["compute"], lane.busy.get("talk")
    middle = [] if talk is None else [("talk", [sum(pair) for pair in zip(compute, talk, strict=True)])]
    return [("wait", lane.present), *middle, ("compute", compute), (HATCH, lane.lost)]


def _covered(edges: Sequence[float], spans: Iterable[tuple[float, float]]) -> list[float]:
    """Return the seconds of the spans that lie in each column."""
    seconds = [0.0] * (len(edges) - 1)
    for since, until in spans:
        for place, (begin, end) in enumerate(pairwise(edges)):
            seconds[place] += max(0.0, min(until, end) - max(since, begin))
    return seconds


def _steps(edges: Sequence[float], shares: Sequence[float], base: float, lane: float) -> list[list[Point]]:
    """Return the outlines of columns of these heights, neighbours in one."""
    found: list[list[Point]] = []
    outline: list[Point] = []
    for since, until, share in zip(edges, edges[1:], shares, strict=False):
        top = base - share * lane
        if base - top < 0.05:
            _close(outline, base, found)
            outline = []
            continue
        if not outline:
            outline = [(since, base)]
        outline += [(since, top), (until, top)]
    _close(outline, base, found)
    return found


def _close(outline: list[Point], base: float, found: list[list[Point]]) -> None:
    if outline:
        found.append([*outline, (outline[-1][0], base)])
