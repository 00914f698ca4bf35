"""Drawings of lines, areas, marks and words, written as SVG that takes its colours from the page, or as pixels.

Colours go by the name of what they stand for. In a page they are CSS variables, so light and dark are the reader's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, NamedTuple

Point = tuple[float, float]
Shape = Literal["circle", "square", "triangle", "diamond", "star", "cross"]
Anchor = Literal["start", "middle", "end"]

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fcfcfa", "#14171b"),
    "ink": ("#1a1e24", "#e8e6e1"),
    "muted": ("#59606a", "#a3abb5"),
    "rule": ("#dcdad4", "#343a42"),
    "one": ("#1d5fa6", "#79b3f2"),
    "two": ("#b4471b", "#f2985f"),
    "three": ("#23733f", "#6fca8f"),
    "four": ("#774a9c", "#c5a0ea"),
    "five": ("#0b6f74", "#5cc7c9"),
    "six": ("#7d5c00", "#dcb552"),
    "compute": ("#2a68ad", "#5f9de0"),
    "talk": ("#e09a3e", "#e8a94f"),
    "wait": ("#d3dae2", "#39424d"),
    "committed": ("#2a68ad", "#5f9de0"),
    "degraded": ("#e09a3e", "#e8a94f"),
    "skipped": ("#a3312a", "#f08379"),
    "lost": ("#a3312a", "#f08379"),
}
"""What is drawn, on light and on dark paper. Words keep a contrast of 4.5 on it, marks and lines one of 3."""

SERIES = ("one", "two", "three", "four", "five", "six")
DASHES: tuple[Sequence[float], ...] = ((), (7, 3), (2, 3), (9, 3, 2, 3))
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "diamond")
HATCH = "hatch"
"""The area style of what was not there: stripes, so that nobody needs colours for it."""


class Line(NamedTuple):
    points: Sequence[Point]
    colour: str
    width: float = 1.6
    dash: Sequence[float] = ()


class Area(NamedTuple):
    """Closed outlines of one colour, or `HATCH`."""

    outlines: Sequence[Sequence[Point]]
    colour: str
    opacity: float = 1.0


class Marks(NamedTuple):
    """Marks of one shape, `size` their radius; `hints` are shown to whoever points at one."""

    points: Sequence[Point]
    shape: Shape
    colour: str
    size: float = 3.0
    hints: Sequence[str] = ()


class Words(NamedTuple):
    at: Point
    text: str
    anchor: Anchor = "start"
    colour: str = "muted"
    size: float = 12.0


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn, in this order, from the upper left corner, in units that are about a pixel on a desk."""

    width: float
    height: float
    parts: list[Line | Area | Marks | Words] = field(default_factory=list)

    def add(self, *parts: Line | Area | Marks | Words) -> None:
        self.parts.extend(parts)


def outline(shape: Shape, at: Point, size: float) -> list[list[Point]]:
    """Return the corners of a mark: closed outlines, of a cross two open strokes."""
    x, y = at
    match shape:
        case "square":
            near = 0.9 * size
            return [[(x - near, y - near), (x + near, y - near), (x + near, y + near), (x - near, y + near)]]
        case "triangle":
            return [[(x, y - 1.2 * size), (x + 1.1 * size, y + 0.8 * size), (x - 1.1 * size, y + 0.8 * size)]]
        case "diamond":
            far = 1.3 * size
            return [[(x, y - far), (x + far, y), (x, y + far), (x - far, y)]]
        case "star":
            far = 1.9 * size
            near = 0.6 * size
            return [
                [
                    *((x, y - far), (x + near, y - near), (x + far, y), (x + near, y + near)),
                    *((x, y + far), (x - near, y + near), (x - far, y), (x - near, y - near)),
                ]
            ]
        case "cross":
            return [[(x - size, y - size), (x + size, y + size)], [(x - size, y + size), (x + size, y - size)]]
        case "circle":
            raise ValueError("a circle has no corners")


def svg(drawing: Drawing, label: str = "", *, alone: bool = False) -> str:
    """Return the drawing as an SVG element that is read out as `label`, or not at all; `alone`: as a file's content."""
    width, height = number(drawing.width), number(drawing.height)
    said = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    head = f'<svg viewBox="0 0 {width} {height}" {said}'
    body = "".join(_element(part) for part in drawing.parts)
    if not alone:
        return f"{head}>{body}</svg>"
    own = f"<style>{colours(':root')}svg{{background:var(--paper);font-family:system-ui,sans-serif}}</style>"
    return f'{head} xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{own}{DEFINITIONS}{body}</svg>'


DEFINITIONS = (
    f'<defs><pattern id="{HATCH}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" fill="var(--paper)"/><rect width="2" height="5" fill="var(--lost)"/></pattern></defs>'
)
"""What drawings refer to; a page has it once."""


def colours(selector: str) -> str:
    """Return the style rules that give the palette's names their colours, by what the reader prefers."""
    light = ";".join(f"--{name}:{pair[0]}" for name, pair in PALETTE.items())
    dark = ";".join(f"--{name}:{pair[1]}" for name, pair in PALETTE.items())
    return f"{selector}{{{light}}}@media(prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def number(value: float) -> str:
    """Return a coordinate to a tenth."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def path(points: Iterable[Point], closed: bool) -> str:
    """Return the path through the points; where it runs along an axis one number is enough."""
    steps: list[str] = []
    last_x = last_y = ""
    for x_value, y_value in points:
        x, y = number(x_value), number(y_value)
        if not steps:
            steps.append(f"M{x} {y}")
        elif y == last_y and x != last_x:
            steps.append(f"H{x}")
        elif x == last_x and y != last_y:
            steps.append(f"V{y}")
        elif x != last_x:
            steps.append(f"L{x} {y}")
        last_x, last_y = x, y
    return "".join(steps) + ("z" if closed else "")


def _element(part: Line | Area | Marks | Words) -> str:
    match part:
        case Line(points, colour, width, dash):
            dashes = f' stroke-dasharray="{" ".join(map(number, dash))}"' if dash else ""
            return (
                f'<path d="{path(points, closed=False)}" fill="none" stroke="var(--{colour})" '
                f'stroke-width="{number(width)}" stroke-linejoin="round"{dashes}/>'
            )
        case Area(outlines, colour, opacity):
            drawn = "".join(path(each, closed=True) for each in outlines)
            fill = f"url(#{HATCH})" if colour == HATCH else f"var(--{colour})"
            thin = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
            return f'<path d="{drawn}" fill="{fill}"{thin}/>' if drawn else ""
        case Words((x, y), text, anchor, colour, size):
            side = "" if anchor == "start" else f' text-anchor="{anchor}"'
            return (
                f'<text x="{number(x)}" y="{number(y)}" fill="var(--{colour})" font-size="{number(size)}"{side}>'
                f"{escape(text)}</text>"
            )
        case Marks():
            return _marks(part)


def _marks(marks: Marks) -> str:
    """Return marks with hints one by one, others together."""
    if marks.hints:
        single = [Marks([point], marks.shape, marks.colour, marks.size) for point in marks.points]
        return "".join(
            f"<g><title>{escape(hint)}</title>{_marks(each)}</g>"
            for each, hint in zip(single, marks.hints, strict=True)
        )
    if marks.shape == "circle":
        size = number(marks.size)
        return "".join(
            f'<circle cx="{number(x)}" cy="{number(y)}" r="{size}" fill="var(--{marks.colour})"/>'
            for x, y in marks.points
        )
    closed = marks.shape != "cross"
    drawn = "".join(path(each, closed) for point in marks.points for each in outline(marks.shape, point, marks.size))
    look = (
        f'fill="var(--{marks.colour})"' if closed else f'fill="none" stroke="var(--{marks.colour})" stroke-width="1.6"'
    )
    return f'<path d="{drawn}" {look}/>' if drawn else ""
