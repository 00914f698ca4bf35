"""`train`: a run on Ray, from its first actor to what it came to."""

from __future__ import annotations

import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable

from decentral.checkpoint import StorageError
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Joined, Left, Record
from decentral.outcome import Outcome
from decentral.replica import held_out
from decentral.workers.cluster import heeding_interrupts, on_cluster
from decentral.workers.crew import Crew
from decentral.workers.job import FleetLost, Job
from decentral.workers.metrics import metrics_served
from decentral.workers.resume import Resumption, find_checkpoint
from decentral.workers.rpc import SECRET_VARIABLE, checked_secret

RESTARTS = 3
"""Times that a run goes on from one checkpoint after all workers were lost, and did not come to the next."""

log = logging.getLogger(__name__)


def train(
    run: Run,
    *,
    address: str | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_restart: Callable[[Iterable[Record]], None] | None = None,
    resumed: Resumption | None = None,
    journal: Iterable[Record] | None = None,
) -> Outcome:
    """Train on Ray workers and return what it came to.

    `address` names a Ray cluster ("host:port", "ray://host:port" or "auto"); None takes the Ray this process has
    initialised, or starts a local one for the run. `on_record` sees every record as it comes. With `resumed` (see
    `workers.resume.find_checkpoint`) the run goes on from a checkpoint, and so it does from its newest one when all
    workers are lost. When the model is cut anew (`pipeline.least`) it goes on where it is. `on_restart` is told the
    records before that, for those after it are made once more. However it ends, no actor is left behind. Raises
    `TaskError` or `ConfigError` as a worker met it, and `RunError` when the cluster cannot be had, or nobody is left
    and there is no checkpoint to go on from.

    `journal` has the records that `on_record` has seen, and those before a checkpoint, whenever somebody goes through
    it: a `RunFolder` reads them from its file. It is the outcome's `records`. None: all records are kept in memory.
    """
    secret = _secret()
    task = run.make_task()
    before = held_out(task, run.seed)  # first: this is where missing data shows
    for stages in range(run.pipeline.least or run.pipeline.stages, run.pipeline.stages + 1):
        run.pipeline.with_stages(stages).assemble(task, run.seed, run.batch_size)  # or the model cannot be cut
    if journal is None:
        kept = _Kept(resumed.records if resumed else (), on_record, on_restart)
        journal, on_record, on_restart = kept.records, kept.see, kept.go_back
    with heeding_interrupts() as heed, metrics_served(run.real, on_record) as see, on_cluster(run, address):

        def begin(now: Run, since: Resumption | None, crew: Crew | None) -> Job:
            return Job(now, secret, see, heed, since, run.pipeline.stages, crew)

        ended, job = _to_the_end(run, begin, journal, resumed, on_restart)
    outcome = Outcome(journal, _seconds(journal), job.params, job.slots, before)
    outcome.grid = ended.pipeline.grid
    outcome.assemble = ended.pipeline.assemble(task, run.seed, run.batch_size)
    outcome.after = held_out(task, run.seed, outcome.merged())
    return outcome


def _to_the_end(
    run: Run,
    begin: Callable[[Run, Resumption | None, Crew | None], Job],
    journal: Iterable[Record],
    resumed: Resumption | None,
    on_restart: Callable[[Iterable[Record]], None] | None,
) -> tuple[Run, Job]:
    """Return the run as it has come to its end, and the job.

    A fleet that is lost whole goes on from the newest checkpoint. One that had better have fewer stages, or more again,
    goes on where it is, with as many as there are places for; or from there too if that fails.
    """
    whole, restarts, crew = run, Counter[str](), None
    while True:
        job = begin(run, resumed, crew)
        try:
            job.start()
            job.supervise()
            job.collect()
            return run, job
        except FleetLost as error:
            lost = error
        finally:
            job.end()
        run = run if lost.stages is None else whole.with_stages(lost.stages)
        crew = lost.crew
        try:
            resumed = find_checkpoint(run, journal) if crew is None else crew.resumption(run, journal)
        except (ConfigError, StorageError) as error:
            raise lost from error
        if crew is None:
            restarts[resumed.folder] += 1
            if restarts[resumed.folder] > RESTARTS:
                raise lost
        since = "where it is" if crew is not None else f"from checkpoint {resumed.folder}"
        anew = "" if lost.stages is None else f", cut into {lost.stages} stages"
        log.warning("%s; the run goes on %s%s", lost, since, anew)
        if on_restart is not None:
            on_restart(resumed.records)


class _Kept:
    """Keeps a run's records in memory, those `before` it first, and passes on what it is told."""

    def __init__(
        self,
        before: Iterable[Record],
        on_record: Callable[[Record], None] | None,
        on_restart: Callable[[Iterable[Record]], None] | None,
    ) -> None:
        self.records = list(before)
        self._on_record, self._on_restart = on_record, on_restart

    def see(self, record: Record) -> None:
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)

    def go_back(self, before: Iterable[Record]) -> None:
        self.records[:] = before
        if self._on_restart is not None:
            self._on_restart(before)


def _seconds(records: Iterable[Record]) -> float:
    ends = [record for record in records if isinstance(record, Joined | Left)]
    began = min(record.time_s for record in ends if isinstance(record, Joined))
    return max(record.time_s for record in ends if isinstance(record, Left)) - began


def _secret() -> str:
    """Return the user's own secret for the run, or a random one; raises `ConfigError`, which does not quote it."""
    secret = os.environ.get(SECRET_VARIABLE)
    if secret is None:
        return secrets.token_hex(32)
    return checked_secret(secret, "unset the variable to have a random one")
