"""Going on with a run from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from decentral.checkpoint import Storage, load, newest, records_before, reopen
from decentral.config import Run
from decentral.coverage import coverage
from decentral.errors import ConfigError
from decentral.journal import Anew, Record
from decentral.snapshot import Snapshot


class Resumption(NamedTuple):
    """A checkpoint to go on from, and what a coordinator has to know of it.

    `records` are those of the journal that were made before it: they are read from there each time. By worker, `lines`
    says how many these are, and `lived` how many of them belong to the life that goes on. It was taken `time_s` seconds
    into the run. `leases` is the state of the book of samples, if they are leased. `passed_over` tells why newer
    checkpoints are not taken.
    """

    folder: str
    records: Iterable[Record]
    lines: Mapping[int, int]
    lived: Mapping[int, int]
    time_s: float
    leases: Mapping[str, Any] | None
    passed_over: Mapping[str, str]


def find_checkpoint(run: Run, journal: Iterable[Record]) -> Resumption:
    """Return where to go on with a run that has left this journal, which can be gone through again and again.

    Raises `ConfigError` if there is no checkpoint.
    """
    if not run.checkpoint.url:
        raise ConfigError("checkpoint.url: this run has kept no checkpoints; there is nothing to go on from")
    found = newest(Storage(run.checkpoint.url))
    if found is None:
        raise ConfigError(f"checkpoint.url: there is no whole checkpoint at {run.checkpoint.url}")
    manifest = found.manifest
    records = Anew(partial(records_before, manifest, journal))
    leases = None
    if run.leases:
        proved = coverage(records)
        leases = {"leased": proved.samples, "open": [list(missing) for missing in proved.missing]}
    return Resumption(
        found.folder,
        records,
        manifest.journal,
        {worker: description.life.records for worker, description in manifest.workers.items()},
        max(description.life.time_s for description in manifest.workers.values()),
        leases,
        found.passed_over,
    )


def state_of(run: Run, folder: str, worker: int) -> Snapshot:
    """Return the worker's state in that checkpoint. Raises `RunError` if it is not whole any more."""
    storage = Storage(run.checkpoint.url)
    return load(storage, reopen(storage, folder), worker)
