"""Figures of how a run went: what each worker did when, where the time went, what rounds came to, what was sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from decentral.report.page.charts import Axis, Frame, axis
from decentral.report.page.course import Course
from decentral.report.page.drawing import HATCH, SERIES
from decentral.report.page.figure import Cells, Figure, Key, axes_of
from decentral.report.page.history import OUTCOMES
from decentral.report.page.lanes import Lanes, draw_lanes, lanes_of
from decentral.report.page.words import duration_text, short_count
from decentral.report.summary import size_text

WIDTHS = {"wide": (1140.0, 256), "narrow": (360.0, 96)}
"""Timelines for desks and for phones: how wide they are, and how many columns of time they have at most."""

BARS = 64
"""Columns at most of what is counted over time."""

ACTIVITIES = {"compute": "computing", "talk": "talking", "wait": "waiting", "lost": "down"}

HOW_EXACT = {
    "spent": "The journal has every piece of time.",
    "metered": "It is taken from accounts that workers gave now and then: between two of these it is spread evenly.",
    "trained": "The journal tells when workers computed; between that they talked or waited.",
    "accounts": "The journal has nothing but what each worker left with: that is spread evenly over each stay.",
}


def timeline(course: Course) -> Figure | None:
    """Return what each worker did when; None for a journal without any time."""
    history = course.read.history
    if not course.edges:
        return None
    across = axis("time", axes_of([course])["time"], course.end.time)
    of_width = {key: (lanes_of(course, columns), width) for key, (width, columns) in WIDTHS.items()}
    lanes = of_width["wide"][0]
    caption = (
        f"A column is {duration_text(lanes.edges[1] - lanes.edges[0])} (on a narrow screen more), the height of a "
        f"colour its share of that. {HOW_EXACT[history.source]}"
    )
    if history.workers_a_row > 1:
        caption += f" A row is the mean of up to {history.workers_a_row} workers."
    told = lanes.tells_talking
    legend = [
        Key("box", "compute", "computing"),
        *[Key("box", "talk", "talking")] * told,
        Key("box", "wait", "waiting" if told else "talking or waiting"),
    ]
    if lanes.gone:
        legend += [Key("hatch", "lost", "down"), Key("cross", "lost", f"lost ({lanes.gone})")]
    if lanes.came:
        legend.append(Key("triangle", "three", f"came ({lanes.came})"))
    return Figure(
        "timeline",
        "What each worker did when",
        caption,
        f"Timeline of {len(history.workers)} workers over {duration_text(history.end_s)}; lost: {lanes.gone} "
        f"times, came after the start: {lanes.came} times. The table of workers has the sums.",
        {key: draw_lanes(each, across, width) for key, (each, width) in of_width.items()},
        legend,
        _lane_table(lanes),
    )


def whereabouts(course: Course) -> Figure | None:
    """Return where each worker's time went, a column for each; None if nobody has said."""
    history = course.read.history
    numbers = sorted(history.workers)
    parts: dict[str, list[float]] = {name: [] for name in ACTIVITIES}
    for number in numbers:
        worker = history.workers[number]
        parts["compute"].append(worker.seconds["compute"] + worker.seconds["evaluate"])
        parts["talk"].append(worker.seconds["talk"])
        parts["wait"].append(worker.seconds["wait"])
        parts["lost"].append(worker.down_s(history.end_s))
    totals = {name: sum(values) for name, values in parts.items()}
    whole = sum(totals.values())
    if not whole:
        return None
    most = max(map(sum, zip(*parts.values(), strict=True)))
    frame = Frame(
        Axis("worker", 0.0, float(len(numbers)), lambda value: f"{value:g}", whole=True), axis("time", "", most)
    )
    inset = 0.1 if len(numbers) <= 64 else 0.0
    for place in range(len(numbers)):
        frame.add_columns(
            [place + inset, place + 1 - inset],
            [(HATCH if name == "lost" else name, [parts[name][place]]) for name in ACTIVITIES],
        )
    shares = {name: f"{called} {totals[name] / whole:.0%}" for name, called in ACTIVITIES.items()}
    return Figure(
        "time",
        "Where the time went",
        "A column for each worker. Traffic that hides behind computing is computing; who is lost is down until it "
        "comes again, or the run ends.",
        f"Time by what workers did: {', '.join(shares.values())}.",
        {"": frame.drawing},
        [Key("hatch" if name == "lost" else "box", name, text) for name, text in shares.items() if totals[name]],
        Cells(
            ["worker", *ACTIVITIES.values()],
            [(str(each), *(duration_text(parts[name][place]) for name in parts)) for place, each in enumerate(numbers)],
        ),
    )


def rounds(course: Course) -> Figure | None:
    """Return what rounds came to over time; None if there were none."""
    outcomes = course.read.history.outcomes
    if not outcomes or not course.edges:
        return None
    order = course.read.history.outcome_names()
    colours = {each: each if each in OUTCOMES else SERIES[3] for each in order}
    edges, counts = course.columns(BARS), {each: course.per_column(("round", each), BARS) for each in order}
    total = sum(outcomes.values())
    frame = _over_time(course, edges, [(colours[each], counts[each]) for each in order], "worker-rounds")
    shares = {each: f"{each} {outcomes[each]:,} ({outcomes[each] / total:.1%})" for each in order}
    return Figure(
        "rounds",
        "What rounds came to",
        f"Worker-rounds in each {duration_text(edges[1] - edges[0])}, {total:,} in all: a round counts for every "
        "worker that it ended for.",
        f"Rounds over time: {', '.join(shares.values())}.",
        {"": frame.drawing},
        [Key("box", colours[each], text) for each, text in shares.items()],
        Cells(
            ["from", *order],
            [
                (duration_text(since), *(f"{counts[each][place]:.0f}" for each in order))
                for place, since in enumerate(edges[:-1])
            ],
        ),
    )


def traffic(course: Course) -> Figure | None:
    """Return at what rate all workers together sent over time; None if nothing was sent."""
    total = course.read.history.sent_bytes
    if not total or not course.edges:
        return None
    edges, sums = course.columns(BARS), course.per_column("sent", BARS)
    rates = [8 * sent / (until - since) for sent, since, until in zip(sums, edges, edges[1:], strict=False)]
    frame = _over_time(course, edges, [("one", rates)], "bit/s")
    rows = [
        (duration_text(since), size_text(sent), f"{short_count(rate)}bit/s")
        for since, sent, rate in zip(edges, sums, rates, strict=False)
    ]
    return Figure(
        "traffic",
        "Traffic",
        f"Bits a second that all workers sent, in bins of {duration_text(edges[1] - edges[0])}. A worker's bytes are "
        "counted when a round of its has ended.",
        f"Bits a second sent by all workers over time; {size_text(total)} in all.",
        {"": frame.drawing},
        (),
        Cells(["from", "sent", "rate"], rows),
    )


def _over_time(course: Course, edges: list[float], stacks: Sequence[tuple[str, list[float]]], counted: str) -> Frame:
    most = max(map(sum, zip(*(values for _, values in stacks), strict=True)))
    across = axis("time", axes_of([course])["time"], course.end.time)
    frame = Frame(across, Axis(counted, 0.0, 1.06 * most, short_count))
    frame.add_columns(edges, stacks)
    return frame


def _lane_table(lanes: Lanes) -> Cells:
    """Return each lane's share of time by what was done, over the whole run."""
    widths = [until - since for since, until in pairwise(lanes.edges)]

    def over_all(shares: list[float]) -> str:
        return f"{sum(share * width for share, width in zip(shares, widths, strict=True)) / sum(widths):.1%}"

    told = ["compute", *["talk"] * lanes.tells_talking]
    rows = [
        (lane.name, over_all(lane.present), *(over_all(lane.busy[each]) for each in told), over_all(lane.lost))
        for lane in lanes.lanes
    ]
    return Cells(["worker", "there", *(ACTIVITIES[each] for each in told), "down"], rows)
