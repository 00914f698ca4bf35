"""Working through the runs of a comparison: those that are done already are not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from decentral.compare.forked import side_by_side
from decentral.compare.one import carry_out, is_complete
from decentral.compare.plan import Job, Plan
from decentral.journal import Record
from decentral.sim.engine import can_fork, cores

Tell = Callable[[str], None]
"""Is told how far the work is, in a few words."""


def work_through(plan: Plan, folder: Path, address: str | None = None, tell: Tell = lambda _words: None) -> None:
    """Carry out every run of the plan that is not complete in the folder.

    With `address` the Ray cluster there does them. Otherwise as many as this machine has cores go on side by side, each
    in a process of its own; or all in this one, one after the other, where processes cannot be had or a run file says
    so. Raises as `carry_out`, and `RunError` if Ray cannot be had or a process dies.
    """
    jobs = [job for job in plan.jobs() if not is_complete(folder / job.folder)]
    processes = min([len(jobs), *map(_processes, jobs)])
    if jobs and address is not None:
        from decentral.compare.parallel import on_ray  # Ray takes a second to import

        on_ray(plan, jobs, folder, address, tell)
    elif processes > 1:
        side_by_side(plan, jobs, folder, processes, tell)
    else:
        _one_by_one(plan, jobs, folder, tell)


def _processes(job: Job) -> int:
    """Return how many processes may be at work while this run is."""
    return job.run.sim.processes or cores() if can_fork(job.run.real.threads) else 1


def _one_by_one(plan: Plan, jobs: Sequence[Job], folder: Path, tell: Tell) -> None:
    for count, job in enumerate(jobs):
        place = f"run {count + 1} of {len(jobs)}, {job.entry}, seed {job.seed}"

        def see(record: Record, place: str = place) -> None:
            tell(f"{place}: {record.time_s:.0f} virtual seconds")

        target = folder / job.folder
        target.parent.mkdir(parents=True, exist_ok=True)
        carry_out(job.run, job.baseline, plan.equal, plan.budget, target, see)
