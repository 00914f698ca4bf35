"""What a page says in words, key figures and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from decentral.accounts import TO_THE_END
from decentral.report.page.course import Course
from decentral.report.page.figure import Cells
from decentral.report.page.folders import ReadRun
from decentral.report.page.history import KEPT, OUTCOMES
from decentral.report.page.words import duration_text, ranges_text, short_count, value_text
from decentral.report.summary import JOULES_PER_KWH, data_parallel_bytes, dollars_text, size_text

SHOWN = 512
"""Rows of a table at most."""

SKIPPED_MUCH = 0.05
"""Share of skipped worker-rounds from which on a page warns."""


class Fact(NamedTuple):
    """A key figure: what it is of, the figure, and what puts it into proportion."""

    name: str
    value: str
    more: str


class Listed(NamedTuple):
    """A table with a title and what must be said of it."""

    title: str
    caption: str
    cells: Cells


def story(course: Course) -> str:
    """Return in a sentence or two what was trained, by how many, for how long, and how it ended."""
    read, history = course.read, course.read.history
    if not history.records:
        return "The journal is empty: nobody has joined the run yet."
    sites = len(set(read.run.fleet.places().values())) if read.run else 0
    who = f"{read.workers} workers" + (f" at {sites} sites" if sites > 1 else "")
    what = f", {short_count(history.parameters)} parameters" if history.parameters else ""
    clock = " of virtual time" if read.virtual else ""
    done = f"{who}{what}: {history.samples:,} samples in {duration_text(history.end_s)}{clock}."
    return f"{done} {_ending(read)}"


def facts(course: Course) -> list[Fact]:
    """Return the key figures of a run, those that are known."""
    read, history = course.read, course.read.history
    found = []
    if read.after is not None:
        since = f"from {value_text(read.before)}" if read.before is not None else ""
        since += "" if read.finished else ", as evaluated last"
        found.append(Fact(f"held-out {read.headline}", value_text(read.after), since))
    found.append(Fact("samples", f"{history.samples:,}", _paced(course)))
    found.append(Fact("virtual time" if read.virtual else "time", duration_text(history.end_s), ""))
    if history.sent_bytes:
        found.append(Fact("sent by all", size_text(history.sent_bytes), _proportion(read)))
    total = sum(history.outcomes.values())
    if total:
        settled = 1 - history.outcomes["skipped"] / total
        found.append(Fact("worker-rounds", f"{total:,}", f"{settled:.1%} not skipped"))
    goodput = read.accounts.get("goodput")
    if goodput is not None:
        found.append(Fact("goodput", f"{goodput:.0%}", "useful of possible samples"))
    if course.end.dollars is not None:
        found.append(Fact("cost", dollars_text(course.end.dollars), course.cost_is))
    lost = sum(stay.reason not in TO_THE_END for worker in history.workers.values() for stay in worker.stays)
    found.append(
        Fact("workers lost", str(lost), f"of {read.workers}" if lost == 0 else f"times, of {read.workers} workers")
    )
    return found


def warnings(read: ReadRun) -> list[str]:
    """Return what a reader of the page should know before believing it, or should look into."""
    history = read.history
    found = list(read.notes)
    if read.stopped:
        found.append(f"The run did not come to its end: {read.stopped}")
    elif not read.summary and history.records and not read.joined:
        found.append(
            "There is no summary: the run still goes on, or its process was killed. The page is as of its journal."
        )
    if history.not_finite:
        found.append(
            f"{history.not_finite:,} local phases had a loss that is not a finite number; charts leave them out."
        )
    total = sum(history.outcomes.values())
    if total and history.outcomes["skipped"] > SKIPPED_MUCH * total:
        found.append(
            f"{history.outcomes['skipped'] / total:.0%} of worker-rounds were skipped: others were gone, or too late."
        )
    refused = sum(history.refused.values())
    if refused:
        found.append(f"{refused:,} frames or contributions were refused; who, whose and why is below.")
    away = [number for number, each in sorted(history.workers.items()) if each.reason not in (None, *TO_THE_END)]
    if away:
        found.append(f"Lost and not back at the end: workers {ranges_text(away)}.")
    if history.contradiction:
        found.append(f"The journal contradicts itself: {history.contradiction}")
    covered = history.coverage()
    if covered and covered.repeated:
        again = sum(each.stop - each.start for each in covered.repeated)
        found.append(f"{again:,} leased samples were trained on more than once.")
    if covered and covered.missing and read.finished:
        missing = sum(each.stop - each.start for each in covered.missing)
        found.append(f"{missing:,} leased samples came into no settled round.")
    return found


def lists(course: Course) -> list[Listed]:
    """Return the tables of a run: workers, links, rounds that were not committed, happenings, refusals."""
    made = (
        _workers(course),
        _channels(course),
        _unsettled(course),
        _links(course),
        _happenings(course),
        _refusals(course),
    )
    return [each for each in made if each.cells.rows]


def compared(courses: Sequence[Course]) -> Cells:
    """Return a row of figures for each run."""
    first = courses[0].read
    priced = all(course.priced for course in courses)
    head = [
        "run",
        "rule",
        "ended",
        first.headline,
        "samples",
        "time",
        "sent",
        *["dollars"] * priced,
        "skipped",
        "computing",
    ]
    rows = []
    for course in courses:
        read, history = course.read, course.read.history
        total = sum(history.outcomes.values())
        spent = sum(sum(worker.seconds.values()) for worker in history.workers.values())
        busy = sum(worker.seconds["compute"] + worker.seconds["evaluate"] for worker in history.workers.values())
        rows.append(
            (
                read.name,
                read.rule,
                "yes" if read.finished else "no",
                value_text(read.after),
                f"{history.samples:,}",
                duration_text(history.end_s),
                size_text(history.sent_bytes),
                *[dollars_text(course.end.dollars or 0.0)] * priced,
                f"{history.outcomes['skipped'] / total:.1%}" if total else "-",
                f"{busy / spent:.0%}" if spent else "-",
            )
        )
    return Cells(head, rows, frozenset({0, 1, 2}))


def _ending(read: ReadRun) -> str:
    if read.finished:
        before, after = value_text(read.before), value_text(read.after)
        return f"Finished: held-out {read.headline} {before} → {after}." if read.after is not None else "Finished."
    return "Stopped before its end." if read.stopped else "Not finished."


def _paced(course: Course) -> str:
    seconds = course.end.time
    return f"{short_count(course.read.history.samples / seconds)}/s" if seconds else ""


def _proportion(read: ReadRun) -> str:
    """Return how the traffic compares with float32 data-parallel training of as many steps."""
    if read.run is None or read.run.pipeline.stages > 1:
        return ""
    usual = sum(
        data_parallel_bytes(read.history.parameters, read.workers, worker.steps)
        for worker in read.history.workers.values()
    )
    return f"{read.history.sent_bytes / usual:.2%} of data-parallel" if usual else ""


def _workers(course: Course) -> Listed:
    read, history = course.read, course.read.history
    groups = read.run.fleet.each() if read.run else []
    accounts = {each["worker"]: each for each in read.accounts.get("workers", ())}
    priced = any(each["dollars"] is not None for each in accounts.values())
    placed = any(group.site for group in groups)
    rows = []
    for number, worker in sorted(history.workers.items())[:SHOWN]:
        group = groups[number] if number < len(groups) else None
        seconds = worker.seconds
        dollars = accounts.get(number, {}).get("dollars")
        rows.append(
            (
                str(number),
                *[(group.site if group else None) or "-"] * placed,
                f"{group.speed:g}" if group else "-",
                f"{worker.step:,}",
                f"{worker.samples:,}",
                " ".join(f"{worker.outcomes[each]:,}" for each in OUTCOMES),
                size_text(worker.sent_bytes),
                size_text(worker.received_bytes),
                *(
                    duration_text(each)
                    for each in (seconds["compute"] + seconds["evaluate"], seconds["talk"], seconds["wait"])
                ),
                duration_text(worker.down_s(history.end_s)),
                *["-" if dollars is None else dollars_text(dollars)] * priced,
                str(len(worker.presence(history.end_s))),
                worker.reason or "there",
            )
        )
    head = [
        *("worker", *["site"] * placed, "speed", "at step", "samples", "rounds c/d/s", "sent", "received"),
        *("computing", "talking", "waiting", "down", *["machine"] * priced, "stays", "end"),
    ]
    words = frozenset({0, len(head) - 1, *[1] * placed})
    more = "" if len(history.workers) <= SHOWN else f" The first {SHOWN} of {len(history.workers)}."
    caption = f"Over all stays of each. Rounds: committed, degraded, skipped.{more}"
    return Listed("Workers", caption, Cells(head, rows, words))


def _channels(course: Course) -> Listed:
    history = course.read.history
    channels: dict[str, Counter[str]] = {}
    for (channel, outcome), count in history.rounds.items():
        channels.setdefault(channel, Counter())[outcome] += count
    outcomes = history.outcome_names()
    rows = [(name, *(f"{counts[each]:,}" for each in outcomes)) for name, counts in list(channels.items())[:SHOWN]]
    return Listed(
        "Channels", "Worker-rounds of each channel, by what they came to.", Cells(["channel", *outcomes], rows)
    )


def _unsettled(course: Course) -> Listed:
    history = course.read.history
    rows = []
    for each in history.unsettled.values():
        absent = ranges_text([worker for worker in history.workers if worker not in each.members])
        rows.append(
            (duration_text(each.time_s), each.channel, str(each.round), each.outcome, ranges_text(each.members), absent)
        )
    more = f" The first {KEPT}." if len(rows) == KEPT else ""
    caption = f"Who was in them, and which of all workers of the run were not.{more}"
    head = ["at", "channel", "round", "outcome", "members", "absent"]
    return Listed("Degraded and skipped rounds", caption, Cells(head, rows, frozenset({1, 3, 4, 5})))


def _links(course: Course) -> Listed:
    links = [each for each in course.read.accounts.get("links", ()) if each["nbytes"]]
    names = {"up": "uplink of {source}", "down": "downlink of {target}", "pair": "{source} to {target}"}
    rows = [
        (
            names.get(each["kind"], "site {source} to {target}").format(**each),
            size_text(each["nbytes"]),
            "-" if each["capacity_bps"] is None else f"{short_count(each['capacity_bps'])}bit/s",
            "-" if each["utilisation"] is None else f"{each['utilisation']:.1%}",
            "-" if each["peak_bps"] is None else f"{short_count(each['peak_bps'])}bit/s",
        )
        for each in sorted(links, key=lambda link: -link["nbytes"])[:SHOWN]
    ]
    totals = course.read.accounts
    parts = [f"{size_text(sum(link['nbytes'] for link in links if link['kind'] == 'up'))} in all"]
    parts += [f"egress {dollars_text(totals['egress_dollars'])}"] if totals.get("egress_dollars") is not None else []
    parts += [f"energy {totals['joules'] / JOULES_PER_KWH:.3g} kWh"] if totals.get("joules") is not None else []
    head = ["link", "carried", "capacity", "utilisation", "peak"]
    return Listed("Links", f"What the network carried, most first: {', '.join(parts)}.", Cells(head, rows))


def _happenings(course: Course) -> Listed:
    history = course.read.history
    rows = [(duration_text(each.time_s), str(each.worker), each.what) for each in history.happenings]
    more = f"The first {len(rows)} of {history.happened}." if history.happened > len(rows) else ""
    return Listed("Comings, goings and repairs", more, Cells(["at", "worker", "what"], rows, frozenset({2})))


def _refusals(course: Course) -> Listed:
    rows = [
        (str(worker), str(source), code, f"{count:,}")
        for (worker, source, code), count in course.read.history.refused.most_common()
    ]
    return Listed(
        "Refused",
        "Frames and contributions that a worker did not take.",
        Cells(["by", "from", "why", "count"], rows, frozenset({2})),
    )
