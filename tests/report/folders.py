"""Run folders for tests of pages, and pages taken apart again."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cluster import cluster, crash

from decentral.config import Run
from decentral.fleet import FleetNetwork, Link, WorkerGroup
from decentral.folder import RunFolder
from decentral.protocols import DiLoCo
from decentral.report.page import page, read_runs
from decentral.report.summary import summarize
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch


def eventful(steps: int = 24, **rule: Any) -> Run:
    """Return a run at two sites with prices, of which one worker crashes and comes again."""
    run = cluster(
        DiLoCo(period=3, **rule), 3, steps, events=[crash(0.4, 1), crash(0.8, 1).model_copy(update={"kind": "join"})]
    )
    priced = (
        WorkerGroup(count=2, site="here", dollars_per_hour=1.0),
        WorkerGroup(site="there", dollars_per_hour=4.0, speed=0.5),
    )
    network = FleetNetwork(links=(Link(bps=1e6, latency_s=0.02),))
    fleet = run.fleet.model_copy(update={"workers": priced, "network": network})
    return run.model_copy(update={"fleet": fleet, "evaluate_every": 6})


def simulated(run: Run, folder: Path, watch: Watch | None = None) -> Path:
    """Simulate the run into the folder; return it."""
    task, files = run.make_task(), RunFolder(folder, run)
    outcome = simulate(run, on_record=lambda record: files.write([record]), watch=watch or Watch())
    files.finish(outcome, task, summarize(run, task, outcome))
    files.close()
    return folder


def written(run: Run, folder: Path, lines: list[str], **summary: Any) -> Path:
    """Make a run folder with these lines in its journal, as they are; return it."""
    RunFolder(folder, run).write(())
    (folder / "journal.jsonl").write_text("".join(lines), encoding="utf-8")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """A page's facts, headings and tables by their names, and all of its text. Fails where elements do not nest."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, *folders: Path) -> None:
        super().__init__()
        self.html = page(read_runs(folders))
        self.facts: dict[str, str] = {}
        self.headings: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.images: list[str] = []
        self._open: list[str] = []
        self._name = ""
        self.feed(self.html)
        assert not self._open

    def rows(self, table: str) -> list[dict[str, str]]:
        """Return the rows of a table by the names of its columns."""
        head, *rows = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "svg" and given.get("role") == "img":
            self.images.append(given["aria-label"] or "")
        if tag == "div" and given.get("class") == "table":
            self._name = given["aria-label"] or ""
            assert self._name not in self.tables
            self.tables[self._name] = []
        elif tag == "tr":
            self.tables[self._name].append([])
        elif tag in ("td", "th"):
            self.tables[self._name][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self.tables[self._name][-1][-1] += data
        elif inside == "dt":
            self._name = data
        elif inside == "dd":
            self.facts[self._name] = data
        elif inside in ("h1", "h2", "h3"):
            self.headings[-1] += data
