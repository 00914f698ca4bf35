"""`train`: a run on Ray, from its first actor to what it came to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Joined, Left, Record
from decentral.outcome import Outcome
from decentral.replica import held_out
from decentral.workers.cluster import heeding_interrupts, on_cluster
from decentral.workers.job import Job
from decentral.workers.metrics import metrics_served
from decentral.workers.resume import Resumption

SECRET_VARIABLE = "DECENTRAL_SECRET"
"""Environment variable of the driver with the run's secret; unset: a random one."""
SECRET_LENGTH = 16


def train(
    run: Run,
    *,
    address: str | None = None,
    on_record: Callable[[Record], None] | None = None,
    resumed: Resumption | None = None,
) -> Outcome:
    """Train on Ray workers and return what it came to.

    `address` names a Ray cluster ("host:port", "ray://host:port" or "auto"); None takes the Ray this process has
    initialised, or starts a local one for the run. `on_record` sees every record as it comes. With `resumed` (see
    `workers.resume.find_checkpoint`) the run goes on from a checkpoint. However it ends, no actor is left behind.
    Raises `TaskError` or `ConfigError` as a worker met it, and `RunError` when the cluster cannot be had or nobody is
    left.
    """
    secret = _secret()
    task = run.make_task()
    before = held_out(task, run.seed)  # first: this is where missing data shows
    assemble = run.pipeline.assemble(task, run.seed, run.batch_size)  # or the model cannot be cut
    with heeding_interrupts() as heed, metrics_served(run.real, on_record) as see, on_cluster(run, address):
        job = Job(run, secret, see, heed, resumed)
        try:
            job.start()
            job.supervise()
            job.collect()
        finally:
            job.end()
    outcome = Outcome(job.records, _seconds(job.records), job.params, job.slots, before)
    outcome.grid, outcome.assemble = run.pipeline.grid, assemble
    outcome.after = held_out(task, run.seed, outcome.merged())
    return outcome


def _seconds(records: list[Record]) -> float:
    began = min(record.time_s for record in records if isinstance(record, Joined))
    return max(record.time_s for record in records if isinstance(record, Left)) - began


def _secret() -> str:
    """Return the user's own secret for the run, or a random one; raises `ConfigError`, which does not quote it."""
    secret = os.environ.get(SECRET_VARIABLE)
    if secret is None:
        return secrets.token_hex(32)
    if len(secret) < SECRET_LENGTH or not all("!" <= letter <= "~" for letter in secret):
        raise ConfigError(
            f"{SECRET_VARIABLE}: the run's secret must be at least {SECRET_LENGTH} printable ASCII characters without "
            "spaces, such as `openssl rand -hex 32` makes; unset the variable to have a random one"
        )
    return secret
