"""Runs carried out side by side, each result kept in a file, so that who begins again goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from examples.stage_loss.runs import Job, Result, measure


def results(jobs: Sequence[Job], target: float, folder: Path) -> Iterator[Result]:
    """Yield what the jobs come to, in their order; those that the folder has already are not done again."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        waiting = [pool.submit(result, job, target, folder) for job in jobs]
        for each in waiting:
            yield each.result()


def result(job: Job, target: float, folder: Path) -> Result:
    """Return what the job comes to at the held-out loss `target`, nats, from the folder if it has that already."""
    path = folder / f"{_digest(job, target)}.json"
    if path.exists():
        return _read(path.read_text(encoding="utf-8"))
    found = measure(*job, target)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
    part.replace(path)
    return found


def _read(text: str) -> Result:
    fields = json.loads(text)
    return Result(**{**fields, "curve": tuple(tuple(point) for point in fields["curve"])})


def _digest(job: Job, target: float) -> str:
    """Return a name that changes with anything in the job's run file, so that a result is that run's own."""
    way, rate, run = job
    return hashlib.sha256(f"{way} {rate} {target} {run.to_table()}".encode()).hexdigest()[:16]
