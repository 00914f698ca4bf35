"""Working through the runs of a comparison: those that are done already are not done again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from decentral.compare.one import carry_out, is_complete
from decentral.compare.plan import Job, Plan
from decentral.journal import Record

RAY_PAYS_S = 20.0
"""Seconds of work from which on a local Ray, which takes three to five to start, is worth it."""

Tell = Callable[[str], None]
"""Is told how far the work is, in a few words."""


def work_through(plan: Plan, folder: Path, address: str | None = None, tell: Tell = lambda _words: None) -> None:
    """Carry out every run of the plan that is not complete in the folder.

    One after the other in this process; on a local Ray, as many side by side as there are cores, when the rest would
    take longer than that takes to start, judged by the runs so far. With `address` all of them are done by that Ray
    cluster. Raises as `carry_out`, and `RunError` if Ray cannot be had.
    """
    jobs: Sequence[Job] = [job for job in plan.jobs() if not is_complete(folder / job.folder)]
    if address is None:
        jobs = _here(plan, jobs, folder, tell)
    if jobs:
        from decentral.compare.parallel import on_ray  # Ray takes a second to import

        on_ray(plan, jobs, folder, address, tell)


def _here(plan: Plan, jobs: Sequence[Job], folder: Path, tell: Tell) -> Sequence[Job]:
    """Carry out runs in this process; return those that are better done side by side."""
    began, cores = time.monotonic(), os.cpu_count() or 1
    for count, job in enumerate(jobs):
        left = len(jobs) - count
        if count and min(cores, left) > 1 and (time.monotonic() - began) / count * left > RAY_PAYS_S:
            return jobs[count:]
        place = f"run {count + 1} of {len(jobs)}, {job.entry}, seed {job.seed}"

        def see(record: Record, place: str = place) -> None:
            tell(f"{place}: {record.time_s:.0f} virtual seconds")

        target = folder / job.folder
        target.parent.mkdir(parents=True, exist_ok=True)
        carry_out(job.run, job.baseline, plan.equal, plan.budget, target, see)
    return ()
