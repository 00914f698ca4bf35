"""Runs of a comparison side by side, as Ray tasks; each brings its folder's files back to this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray

from decentral.compare.budget import Equal
from decentral.compare.one import carry_out
from decentral.compare.plan import Job, Plan
from decentral.config import validated
from decentral.errors import DecentralError, RunError
from decentral.workers.cluster import connected, first_line, heeding_interrupts

LOOK_S = 0.5
"""Seconds until Ctrl-C is noticed."""

Files = dict[str, bytes]
"""A folder's files by name."""


def on_ray(plan: Plan, jobs: Sequence[Job], folder: Path, address: str, tell: Callable[[str], None]) -> None:
    """Carry out the runs on the Ray of this process, if it has one already, or on the cluster at `address`.

    A run takes as many CPUs as it has threads. The first error ends all. Raises as `carry_out`, and `RunError` if Ray
    cannot be had or loses a run.
    """
    with heeding_interrupts() as heed, _cluster(address), _submitted(plan, jobs) as waiting:
        while waiting:
            tell(f"{len(jobs) - len(waiting)} of {len(jobs)} runs done, the others side by side")
            done, _ = ray.wait(list(waiting), timeout=LOOK_S)
            heed()
            for ref in done:
                _put(_files_of(ref), folder / waiting.pop(ref).folder)


@contextmanager
def _submitted(plan: Plan, jobs: Sequence[Job]) -> Iterator[dict[Any, Job]]:
    """Have the runs under way, by what they will bring; those still under way at the end are cancelled."""
    refs = {}
    try:
        for job in jobs:
            task = _task.options(num_cpus=job.run.real.threads)
            refs[task.remote(job.run.to_table(), job.baseline.to_table(), plan.equal, plan.budget)] = job
        yield refs
    finally:
        _, running = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        for ref in running:  # of one that is done, at this moment or before, Ray may fail for good
            ray.cancel(ref, force=True)


@ray.remote
def _task(run: dict[str, Any], baseline: dict[str, Any], equal: Equal, budget: float | None) -> Files | DecentralError:
    """Carry out a run on whatever machine this is; return its files, or the error that it ended with."""
    alone = {"sim": {"processes": 1}}  # the other cores are other runs'
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "run"
        try:
            ours, theirs = (validated({**table, **alone}, "run") for table in (run, baseline))
            carry_out(ours, theirs, equal, budget, target)
        except DecentralError as error:
            return error
        return {path.name: path.read_bytes() for path in target.iterdir()}


def _files_of(ref: Any) -> Files:
    try:
        answer: Files | DecentralError = ray.get(ref)
    except ray.exceptions.RayError as error:
        raise RunError(f"a run was lost on Ray: {first_line(error)}") from error
    if isinstance(answer, DecentralError):
        raise answer
    return answer


def _put(files: Files, target: Path) -> None:
    """Leave the files in a folder that has its name when all of them are there."""
    part = target.with_name(target.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (part / name).write_bytes(content)
    part.rename(target)


def _cluster(address: str) -> AbstractContextManager[None]:
    return nullcontext() if ray.is_initialized() else connected(address)
