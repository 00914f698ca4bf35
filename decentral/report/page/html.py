"""The page: one HTML file with everything in it, no script, and nothing to fetch."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files

from decentral.report.page.course import Course
from decentral.report.page.details import Fact, compared, facts, lists, story, warnings
from decentral.report.page.drawing import DEFINITIONS, HATCH, Area, Drawing, Line, Marks, colours, svg
from decentral.report.page.figure import Cells, Figure, Key, axes_of
from decentral.report.page.folders import ReadRun
from decentral.report.page.learning import fronts, held_out, spread, training_loss
from decentral.report.page.working import rounds, timeline, traffic, whereabouts

POLICY = "default-src 'none';style-src 'unsafe-inline';img-src data:"
"""What the page may load, which is nothing: the browser holds it to that."""

IN_FULL = 6
"""Runs of a comparison that are shown in full as well; of more, each is a page of its own better."""


def figures_of(course: Course) -> list[Figure]:
    """Return the figures of one run, those that its journal has something for."""
    made = (
        held_out([course]),
        training_loss([course]),
        whereabouts(course),
        timeline(course),
        rounds(course),
        traffic(course),
        spread(course),
    )
    return [figure for figure in made if figure is not None]


def figures_of_all(courses: Sequence[Course]) -> list[Figure]:
    """Return the figures in which several runs stand side by side."""
    made = (held_out(courses), training_loss(courses))
    return [*(figure for figure in made if figure is not None), *fronts(courses)]


def page(runs: Sequence[ReadRun]) -> str:
    """Return the page on a run, or on several compared."""
    courses = [Course(run) for run in runs]
    if len(courses) == 1:
        return _document(f"{runs[0].rule} on {runs[0].task}: {runs[0].name}", _one(courses[0]))
    return _document(f"{len(runs)} runs compared", _several(courses))


def _one(course: Course) -> str:
    read = course.read
    return (
        _header("Run report", f"{read.rule} on {read.task}", story(course), str(read.folder))
        + f"<main>{_warned(read)}{_facts(facts(course))}"
        + _switch(axes_of([course]))
        + _figures(figures_of(course))
        + _lists(course, 2)
        + "</main>"
        + _footer()
    )


def _several(courses: Sequence[Course]) -> str:
    names = ", ".join(dict.fromkeys(course.read.rule for course in courses))
    tasks = ", ".join(dict.fromkeys(course.read.task for course in courses))
    body = _header("Comparison", f"{len(courses)} runs of {tasks}", f"Rules: {names}.", "")
    body += "<main>" + _switch(axes_of(courses)) + _figures(figures_of_all(courses))
    body += f"<section><h2>What each run came to</h2>{_table(compared(courses), 'What each run came to')}</section>"
    if len(courses) > IN_FULL:
        body += "<section><h2>Each run</h2><p>Each has a page of its own:</p><ul>"
        body += "".join(f"<li><code>decentral report {escape(str(c.read.folder))}</code></li>" for c in courses)
        return body + "</ul></section></main>" + _footer()
    for course in courses:
        whose = f"{course.read.name}: "
        inside = _warned(course.read) + _facts(facts(course)) + _figures(figures_of(course), 3, whose)
        inside += _lists(course, 3, whose)
        body += (
            f'<section><details class="run"><summary><h2>{escape(course.read.name)}</h2> {escape(story(course))}'
            f"</summary>{inside}</details></section>"
        )
    return body + "</main>" + _footer()


def _document(title: str, body: str) -> str:
    style = files("decentral.report.page").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{colours(":root")}{style}</style></head>'
        f'<body><svg class="defs" aria-hidden="true">{DEFINITIONS}</svg>{body}</body></html>\n'
    )


def _header(kind: str, title: str, words: str, where: str) -> str:
    place = f"<p><code>{escape(where)}</code></p>" if where else ""
    return (
        f'<header><p class="kind">decentral · {kind}</p><h1>{escape(title)}</h1>'
        f'<p class="story">{escape(words)}</p>{place}</header>'
    )


def _footer() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("decentral", "torch"))
    return f"<footer><p>Page made by {escape(versions)}, Python {platform.python_version()}.</p></footer>"


def _warned(read: ReadRun) -> str:
    found = warnings(read)
    if not found:
        return ""
    items = "".join(f"<li>{escape(each)}</li>" for each in found)
    return f'<div class="warnings" role="note"><strong>To note</strong><ul>{items}</ul></div>'


def _facts(found: Iterable[Fact]) -> str:
    items = "".join(
        f"<div><dt>{escape(each.name)}</dt><dd>{escape(each.value)}<small>{escape(each.more)}</small></dd></div>"
        for each in found
    )
    return f'<dl class="facts">{items}</dl>'


def _switch(axes: dict[str, str]) -> str:
    """Return the choice of the axis that curves are drawn along; style alone shows what is chosen."""
    inputs = "".join(
        f'<label><input type="radio" name="axis" id="axis-{kind}"{"" if place else " checked"}> {escape(label)}</label>'
        for place, (kind, label) in enumerate(axes.items())
    )
    return f'<fieldset class="switch"><legend>Curves along</legend>{inputs}</fieldset>'


def _figures(figures: Sequence[Figure], level: int = 2, whose: str = "") -> str:
    return '<div class="figures">' + "".join(_figure(each, level, whose) for each in figures) + "</div>"


def _figure(figure: Figure, level: int, whose: str) -> str:
    drawn = "".join(
        f'<div class="drawn {"by-" + key if key else "only"}">{svg(drawing, whose + figure.label)}</div>'
        for key, drawing in figure.drawings.items()
    )
    legend = f'<ul class="legend">{"".join(map(_key, figure.legend))}</ul>' if figure.legend else ""
    data = "" if figure.data is None else _folded("Data", _table(figure.data, f"{whose}{figure.title}: data"))
    wide = " wide" if "wide" in figure.drawings else ""
    return (
        f'<figure class="{figure.key}{wide}"><h{level}>{escape(figure.title)}</h{level}>{legend}{drawn}'
        f"<figcaption>{escape(figure.caption)}</figcaption>{data}</figure>"
    )


def _key(key: Key) -> str:
    sign = Drawing(22, 12)
    colour = HATCH if key.sign == "hatch" else key.colour
    if key.sign == "line":
        sign.add(Line([(0, 6), (22, 6)], colour, 2.0, key.dash))
    elif key.sign == "box" or key.sign == "hatch":
        sign.add(Area([[(4, 1), (18, 1), (18, 11), (4, 11)]], colour))
    else:
        sign.add(Marks([(11, 6)], key.sign, colour, 4.0))
    return f"<li>{svg(sign)}{escape(key.text)}</li>"


def _lists(course: Course, level: int, whose: str = "") -> str:
    read = course.read
    body = "".join(
        f"<section><h{level}>{escape(each.title)}</h{level}><p>{escape(each.caption)}</p>"
        f"{_table(each.cells, whose + each.title)}</section>"
        for each in lists(course)
    )
    if read.run_file:
        shown = f'<pre tabindex="0">{escape(read.run_file)}</pre>'
        body += (
            f"<section><h{level}>Run file</h{level}>{_folded('run.toml: versions and every field', shown)}</section>"
        )
    return body


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _table(cells: Cells, caption: str) -> str:
    head = "".join(f'<th scope="col"{_kind(cells, place)}>{escape(name)}</th>' for place, name in enumerate(cells.head))
    kinds = [_kind(cells, place) for place in range(len(cells.head))]
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in cells.rows
    )
    return (
        f'<div class="table" role="group" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _kind(cells: Cells, place: int) -> str:
    return ' class="w"' if place in cells.words else ""
