"""Going on with a run from its newest checkpoint or where it is, with the stages that it had or with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from decentral.checkpoint import Description, Found, Storage, load, load_spans, newest, records_before, reopen
from decentral.config import Run
from decentral.coverage import coverage
from decentral.errors import ConfigError
from decentral.journal import Anew, Left, Record
from decentral.pipeline import OldStages, Pipeline
from decentral.replica import Replica
from decentral.snapshot import Snapshot


class Resumption(NamedTuple):
    """A checkpoint to go on from, and what a coordinator has to know of it; `folder` is empty if workers hold it.

    `records` are those of the journal that come before it: they are read from there each time. `lines` says how many
    these are, by worker. It was taken `time_s` seconds into the run. `leases` is the state of the book of samples, if
    they are leased. `passed_over` tells why newer checkpoints are not taken.
    """

    folder: str
    records: Iterable[Record]
    lines: Mapping[int, int]
    time_s: float
    leases: Mapping[str, Any] | None
    passed_over: Mapping[str, str]


def find_checkpoint(run: Run, journal: Iterable[Record]) -> Resumption:
    """Return where to go on with a run that has left this journal, which can be gone through again and again.

    If the model was cut otherwise, whoever was there leaves there and then: workers are other parts of it from now on.
    Raises `ConfigError` if there is no checkpoint, or it cannot be cut anew.
    """
    if not run.checkpoint.url:
        raise ConfigError("checkpoint.url: this run has kept no checkpoints; there is nothing to go on from")
    found = newest(Storage(run.checkpoint.url))
    if found is None:
        raise ConfigError(f"checkpoint.url: there is no whole checkpoint at {run.checkpoint.url}")
    stages = _other_stages(run, found)
    if stages is not None:
        run.rule.check_other_stages()
        stages.vectors()  # or something is kept that cannot be cut
    manifest, old = found.manifest, None if stages is None else len(stages.layouts)
    resumption = go_on_from(run, manifest.workers, manifest.journal, old, journal)
    return resumption._replace(folder=found.folder, passed_over=found.passed_over)


def go_on_from(
    run: Run,
    workers: Mapping[int, Description],
    journalled: Mapping[int, int],
    old: int | None,
    journal: Iterable[Record],
) -> Resumption:
    """Return where to go on with a run whose workers had what is described, and so many lines of the journal.

    There were `old` stages, None if they are those of the run.
    """
    left = [] if old is None else list(_left(workers, cut_anew(old, run.pipeline.stages)))
    records = Anew(lambda: chain(records_before(journalled, journal), left))
    lines = Counter(journalled)
    lines.update(record.worker for record in left)
    leases = None
    if run.leases:
        proved = coverage(records)
        leases = {"leased": proved.samples, "open": [list(missing) for missing in proved.missing]}
    return Resumption(
        folder="",
        records=records,
        lines=lines,
        time_s=max(description.life.time_s for description in workers.values()),
        leases=leases,
        passed_over={},
    )


def cut_anew(old: int, new: int) -> str:
    """Return the reason for which workers leave when the model is cut anew."""
    return f"cut anew, {old} to {new} stages"


def state_of(run: Run, folder: str, worker: int, replica: Replica) -> Snapshot:
    """Return what the worker, which trains that replica or stage, begins with in that checkpoint.

    Raises `RunError` if it is not whole any more.
    """
    storage = Storage(run.checkpoint.url)
    found, grid = reopen(storage, folder), run.pipeline.grid
    stages = _other_stages(run, found)
    if stages is None:
        return load(storage, found, worker, grid.column(worker, max(found.manifest.workers) + 1))
    assembly = stages.assembly(grid.replica(worker), replica.layout, replica.buffers())
    return assembly.loaded(partial(load_spans, storage, found))


def _other_stages(run: Run, found: Found) -> OldStages | None:
    """Return the stages of the checkpoint, None if they are those of the run."""
    table = found.manifest.run
    old = Pipeline.model_validate(table.get("pipeline", {}))
    if old.stages == run.pipeline.stages == 1:
        return None
    task = run.make_task()
    layouts = old.layouts(task, run.seed, table.get("batch_size", run.batch_size))
    if layouts == run.pipeline.layouts(task, run.seed, run.batch_size):
        return None
    return OldStages(layouts, found.manifest.workers)


def _left(workers: Mapping[int, Description], reason: str) -> Iterator[Left]:
    """Yield the last records of workers that were there when a checkpoint was taken."""
    for worker, described in sorted(workers.items()):
        life = described.life
        yield Left(
            time_s=life.time_s,
            worker=worker,
            reason=reason,
            step=described.step,
            seconds=dict(life.seconds),
            sent_bytes=life.sent_bytes,
            received_bytes=life.received_bytes,
            messages_sent=life.messages_sent,
        )
