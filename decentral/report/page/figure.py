"""What a figure is: a title, drawings, words for whoever cannot see them, and a table of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from decentral.report.page.course import Course, Place
from decentral.report.page.drawing import DASHES, SERIES, SHAPES, Drawing, Shape
from decentral.report.page.words import axis_text, duration_text

Sign = Literal["line", "box", "hatch", "circle", "square", "triangle", "diamond", "star", "cross"]


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend: its sign, that one's colour, and what it stands for. A line may be dashed."""

    sign: Sign
    colour: str
    text: str
    dash: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Cells:
    """A table: its head, and its rows of as many cells. The cells are numbers but for the columns `words`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: `drawings` by the axis that each is along, or by what it is wide enough for, or one alone as "".

    `label` is what is read out in its place.
    """

    key: str
    title: str
    caption: str
    label: str
    drawings: dict[str, Drawing]
    legend: Sequence[Key] = ()
    data: Cells | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """How the lines and marks of one of several runs look: no two of the first 24 alike."""

    colour: str
    dash: Sequence[float]
    shape: Shape


def look(index: int) -> Look:
    """Return the look of the run with this place."""
    turn = index + index // len(SERIES)
    return Look(SERIES[index % len(SERIES)], DASHES[turn % len(DASHES)], SHAPES[turn % len(SHAPES)])


def axes_of(courses: Sequence[Course]) -> dict[str, str]:
    """Return the fields of `Place` that the runs can be read along, and what these are called; no unknown dollars."""
    virtual = all(course.read.virtual for course in courses)
    names = {"samples": "samples", "time": "virtual time" if virtual else "time", "bytes": "bytes sent"}
    if all(course.priced for course in courses):
        names["dollars"] = "dollars"
    return names


def along(place: Place, kind: str) -> float:
    """Return how far along an axis of `axes_of` a place is."""
    value = getattr(place, kind)
    return 0.0 if value is None else float(value)


def place_text(place: Place, kind: str) -> str:
    """Return the same in words, with its unit."""
    value = along(place, kind)
    if kind == "samples":
        return f"{value:,.0f}"
    return duration_text(value) if kind == "time" else axis_text(kind)(value)
