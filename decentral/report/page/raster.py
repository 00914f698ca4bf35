"""Drawings as pixels, by matplotlib: the same parts at the same places as in the SVG, on light paper."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

from decentral.report.page.drawing import HATCH, PALETTE, Area, Drawing, Line, Marks, Point, Shape, Words, outline

POINTS = 72.0
SCALE = 2.0
"""Pixels to a unit of the drawing."""


def write_png(drawing: Drawing, path: Path) -> None:
    """Write the drawing as a PNG file."""
    paper = PALETTE["paper"][0]
    figure = Figure(figsize=(drawing.width / POINTS, drawing.height / POINTS), facecolor=paper)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis("off")
    for order, part in enumerate(drawing.parts):
        match part:
            case Line(points, colour, width, dash):
                (line,) = axes.plot(*zip(*points, strict=True), color=PALETTE[colour][0], lw=width, zorder=order)
                if dash:
                    line.set_dashes([each / width for each in dash])
            case Area(outlines, colour, opacity):
                for each in outlines:
                    look = (
                        {"facecolor": paper, "edgecolor": PALETTE["lost"][0], "hatch": "//////", "linewidth": 0.0}
                        if colour == HATCH
                        else {"facecolor": PALETTE[colour][0], "alpha": opacity, "linewidth": 0.0}
                    )
                    axes.add_patch(Polygon(each, closed=True, zorder=order, **look))
            case Words(at, text, anchor, colour, size):
                side = {"start": "left", "middle": "center", "end": "right"}[anchor]
                axes.text(*at, text, ha=side, va="baseline", color=PALETTE[colour][0], fontsize=size, zorder=order)
            case Marks(points, shape, colour, size):
                for point in points:
                    _mark(axes, shape, point, size, PALETTE[colour][0], order)
    figure.savefig(path, dpi=POINTS * SCALE)


def _mark(axes: Axes, shape: Shape, at: Point, size: float, colour: str, order: int) -> None:
    if shape == "circle":
        axes.add_patch(Circle(at, size, color=colour, linewidth=0.0, zorder=order))
        return
    for corners in outline(shape, at, size):
        if shape == "cross":
            axes.plot(*zip(*corners, strict=True), color=colour, lw=1.6, zorder=order)
        else:
            axes.add_patch(Polygon(corners, closed=True, color=colour, linewidth=0.0, zorder=order))
