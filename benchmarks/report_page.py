"""The page on a run of 64 workers with a journal of 100,000 records: seconds to make it, its size, its first paint.

The journal is made by rule, not by a simulation: local phases, rounds of all, accounts, evaluations, and every so often
a worker that is lost and comes again. The first paint needs Chromium and its driver; without them it is left out.

    python -m benchmarks.report_page [--workers 64] [--records 100000]
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decentral.config import Run
from decentral.fleet import Fleet, WorkerGroup
from decentral.folder import RunFolder
from decentral.journal import Evaluated, Joined, Left, Metered, Record, Synced, Trained
from decentral.report.page import page, read_runs

STEPS, STEP_S, TALK_S, PARAMETERS = 10, 0.5, 1.5, 1_000_000
EVERY = 20
"""Rounds from one loss of a worker to the next; it is away for half of them."""


def journal(workers: int) -> Iterator[Record]:
    """Yield the records of a run without end."""
    draw = random.Random(0)
    now, round_, sent = 0.0, 0, dict.fromkeys(range(workers), 0)
    computed, talked = dict.fromkeys(sent, 0.0), dict.fromkeys(sent, 0.0)
    for worker in sent:
        yield Joined(time_s=now, worker=worker, parameters=PARAMETERS)
    away: int | None = None
    while True:
        round_ += 1
        if round_ % EVERY == 0:
            away = draw.randrange(1, workers)
            yield Left(
                time_s=now,
                worker=away,
                reason="crashed",
                step=round_ * STEPS,
                seconds={"compute": computed[away], "talk": talked[away]},
                sent_bytes=sent[away],
                received_bytes=sent[away],
                messages_sent=round_,
            )
        if away is not None and round_ % EVERY == EVERY // 2:
            computed[away], talked[away], sent[away] = 0.0, 0.0, 0
            yield Joined(time_s=now, worker=away, parameters=PARAMETERS)
            away = None
        here = [worker for worker in sent if worker != away]
        for worker in here:
            seconds = STEPS * STEP_S * draw.uniform(0.7, 1.0)
            computed[worker] += seconds
            sent[worker] += 2 * PARAMETERS
            yield Trained(
                time_s=now + seconds,
                worker=worker,
                step=round_ * STEPS,
                steps=STEPS,
                samples=STEPS * 8,
                seconds=seconds,
                loss=2 + 4 / round_**0.5 + draw.gauss(0, 0.05),
            )
        now += STEPS * STEP_S + TALK_S
        outcome = "skipped" if round_ % 97 == 0 else "degraded" if round_ % EVERY == 0 else "committed"
        for worker in here:
            yield Synced(
                time_s=now,
                worker=worker,
                channel="sync",
                round=round_,
                outcome=outcome,
                members=tuple(here),
                sent_bytes=sent[worker],
            )
            talked[worker] += TALK_S
            told = {"compute": computed[worker], "talk": talked[worker]}
            yield Metered(time_s=now, worker=worker, seconds=told, loading_s=0.0, received_bytes=sent[worker], sent=())
        if round_ % 10 == 0:
            metrics = {"loss": 2 + 4 / round_**0.5, "bits_per_byte": 3 + 5 / round_**0.5}
            yield Evaluated(time_s=now, worker=0, step=round_ * STEPS, metrics=metrics)


def first_paint(path: Path) -> float | None:
    """Return milliseconds until Chromium has painted something of the page; None where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        return None
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.get(path.as_uri())
        painted = browser.execute_async_script(
            "const done = arguments[0];"
            "new PerformanceObserver(list => done(list.getEntries()[0].startTime))"
            ".observe({type: 'paint', buffered: true});"
        )
        return float(painted)
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--records", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        groups = (WorkerGroup(count=options.workers, dollars_per_hour=1.0),)
        folder = RunFolder(home / "run", Run(fleet=Fleet(workers=groups)))
        folder.write(islice(journal(options.workers), options.records))
        folder.close()
        began = time.perf_counter()
        made = page(read_runs([home / "run"]))
        seconds = time.perf_counter() - began
        path = home / "report.html"
        path.write_text(made, encoding="utf-8")
        paint = first_paint(path)
        tracemalloc.start()
        page(read_runs([home / "run"]))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        table = Table(f"{options.workers} workers, {options.records:,} records", "measured", "allowed")
        table.add_row("seconds to make the page", f"{seconds:.2f}", "5")
        table.add_row("its size in MB", f"{path.stat().st_size / 1e6:.2f}", "5")
        table.add_row("memory at the peak in MB", f"{peak / 1e6:.0f}", "-")
        table.add_row("first paint in ms", "-" if paint is None else f"{paint:.0f}", "1000")
    Console().print(table)


if __name__ == "__main__":
    main()
