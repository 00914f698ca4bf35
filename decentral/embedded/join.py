"""`join`: a training loop of the user's own becomes a worker of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from decentral.config import Run, read_run, validated
from decentral.embedded.beside import Beside
from decentral.embedded.coordination import See
from decentral.embedded.copies import Copy
from decentral.embedded.gate import Gate
from decentral.embedded.own_loop import OwnLoop
from decentral.embedded.replica import AttachedReplica
from decentral.embedded.site import Site
from decentral.embedded.sync import Sync
from decentral.embedded.whereabouts import Wishes, whereabouts
from decentral.errors import ConfigError
from decentral.fleet import Fleet as Machines
from decentral.fleet import WorkerGroup
from decentral.folder import RunFolder
from decentral.protocols import SyncRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger(__name__)

ENDLESS = 1 << 40
"""Local steps of a run whose file says none: it lasts as long as the loops do."""


def join(
    run: Run | Mapping[str, Any] | str | Path | None = None,
    *,
    rule: SyncRule | None = None,
    worker: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    secret: str | None = None,
    host: str | None = None,
    apart: bool | None = None,
    out: str | Path | None = None,
) -> Fleet:
    """Return the fleet that this process belongs to, for a `with` block around a training loop.

        with decentral.join("run.toml", rule=DiLoCo(period=100)) as fleet:
            sync = fleet.attach(model, optimizer)
            for batch in loader:
                ...; optimizer.step(); optimizer.zero_grad()
                sync.step(loss)

    `run` is a run file, its contents, or a `Run`; None: all defaults. `rule` stands in for its rule. This is worker
    `worker` of `workers`; worker 0 serves the coordinator at `address` ("host:port") to whoever has the `secret`, if
    `decentral coordinate` does not, `apart` from all workers. What is not given comes from DECENTRAL_WORKER,
    DECENTRAL_WORKERS, DECENTRAL_ADDRESS, DECENTRAL_SECRET and DECENTRAL_APART (1 or 0), then from what torchrun and
    Slurm set. The others reach this worker at `host` (None: the interface towards the coordinator). The journal of the
    whole run goes into worker 0's folder `out`, if it names one. Raises `ConfigError`.
    """
    wishes = Wishes(worker, workers, address, secret, host, apart)
    wishes.check()
    return Fleet(_read(run), rule, wishes, None if out is None else Path(out))


class Fleet:
    """The workers of a run, one of whom this process is, or a part of. Made by `join`, used in a `with` block."""

    def __init__(self, run: Run, rule: SyncRule | None, wishes: Wishes, out: Path | None) -> None:
        self._run, self._rule, self._wishes, self._out = run, rule, wishes, out
        self._sync: Sync | None = None
        self._beside: Beside | None = None
        self._files = ExitStack()
        self._is_entered = False
        self._came_at = 0
        self.worker = self.workers = -1
        """Which worker of how many this process is, or is a part of, once a model is attached."""

    def __enter__(self) -> Fleet:
        self._is_entered = True
        return self

    def attach(self, model: nn.Module, optimizer: Optimizer, *, group: ProcessGroup | None = None) -> Sync:
        """Join the run with this model, and wait until it begins; return what the loop calls after each step.

        All workers must make the same model with the same weights. Who comes to a run that has begun has its present
        parameters, and the optimiser's running means, when this returns. Ranks of a process `group` share one replica,
        whole or sharded: all of them call this. Raises `ConfigError`, `TaskError` and `RunError`.
        """
        if not self._is_entered:
            raise ConfigError("attach: use the fleet in a with block: `with decentral.join(...) as fleet:`")
        if self._sync is not None:
            raise ConfigError("attach: a worker has one model and one optimizer, and they are attached already")
        site, gate = Site(group), Gate()
        copy = Copy(model, optimizer, site, torch.device("cpu") if self._run.real.offload else None)
        self._sync = Sync(copy, site, gate)
        copy.gather()
        if site.speaks:
            try:
                self._beside = self._begin(copy, site, gate, self._sync.interrupt)
            except BaseException as error:  # the other ranks wait for what comes of it
                gate.end(error)
        self._sync.begin()
        self._came_at = self._sync.steps
        self.worker, self.workers = site.same((self.worker, self.workers))
        return self._sync

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._files:
            try:
                if self._sync is not None and error is None:
                    if self._sync.steps == self._came_at:
                        log.warning("worker %d leaves without one sync.step(): it trained alone", self.worker)
                    self._sync.close()
            except BaseException as raised:
                self._leave(raised)
                raise
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        if self._sync is not None and error is not None:
            self._sync.abandon()
        if self._beside is not None:
            if error is not None:
                self._beside.leave(_reason(error))
            self._beside.wait()

    def _begin(self, copy: Copy, site: Site, gate: Gate, ended: Callable[[], None]) -> Beside:
        given = self._run.model_fields_set
        size = self._run.fleet.size if "fleet" in given else None
        here = whereabouts(self._wishes, os.environ, fleet=size, shared=site.size > 1)
        self.worker, self.workers = here.worker, here.workers
        if here.apart and self._out is not None:
            raise ConfigError(
                "out: the coordinator is apart, and the journal with it; give `decentral coordinate` --out"
            )
        run = for_loops(self._run, here.workers, self._rule)
        run.rule.check_own_loop(norms=bool(copy.norms), endless="steps" not in given)
        see = self._files.enter_context(writing(run, self._out))
        beside = Beside(run, here, AttachedReplica(copy, gate, run.batch_size), gate, see=see, ended=ended)
        beside.start()
        return beside


@contextmanager
def writing(run: Run, out: Path | None) -> Iterator[See]:
    """Yield what writes a run's records into its folder `out`; None: nowhere."""
    if out is None:
        yield lambda _records: None
        return
    with closing(RunFolder(out, run)) as folder:
        yield folder.write


def _reason(error: BaseException) -> str:
    return f"failed: {type(error).__name__}"


def _read(run: Run | Mapping[str, Any] | str | Path | None) -> Run:
    if isinstance(run, Run):
        return run
    if isinstance(run, Mapping):
        return validated(run, "run")
    return Run() if run is None else read_run(Path(run))


def for_loops(run: Run, workers: int, rule: SyncRule | None = None) -> Run:
    """Return the run as loops of the users' own do it. Raises `ConfigError` for what they cannot."""
    for able, field in (
        (not run.leases, "leases"),
        (run.parity.workers is None, "parity.workers"),
        (not run.checkpoint.url, "checkpoint.url"),
        (run.pipeline.stages == 1, "pipeline.stages"),
        (run.real.min_workers is None, "real.min_workers"),
    ):
        if not able:
            raise ConfigError(f"{field}: not for a training loop of your own; leave it out")
    fields = run.to_fields() | {"evaluate_every": 0, "rule": run.rule if rule is None else rule}
    fields["task"] = {"name": OwnLoop.spelling()}
    if "steps" not in run.model_fields_set:
        fields["steps"] = ENDLESS
    if "fleet" not in run.model_fields_set:
        fields["fleet"] = Machines(workers=(WorkerGroup(count=workers),))
    notices = tuple(name for name in run.real.notices if name != "ray")
    fields["real"] = run.real.model_copy(update={"notices": notices})
    return validated(fields, "join")
