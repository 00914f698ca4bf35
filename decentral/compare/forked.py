"""Runs of a comparison side by side, each in a process forked from this one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from decentral.compare.one import carry_out
from decentral.compare.plan import Job, Plan
from decentral.config import Run, Sim
from decentral.errors import RunError
from decentral.journal import Record
from decentral.sim.engine import answer_of


def side_by_side(plan: Plan, jobs: Sequence[Job], folder: Path, processes: int, tell: Callable[[str], None]) -> None:
    """Carry out the runs, so many at a time. The last to begin may share its local steps out among as many processes.

    For the others will be done before it. The first error ends all. Raises as `carry_out`, and `RunError` if a process
    dies.
    """
    waiting, under_way = deque(jobs), dict[Connection, _Child]()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < processes:
                job = waiting.popleft()
                child = _Child(plan, job, folder, alone=not waiting)
                under_way[child.connection] = child
            tell(f"{len(jobs) - len(waiting) - len(under_way)} of {len(jobs)} runs done, the others side by side")
            for connection in wait(list(under_way)):
                under_way[connection].require_done()  # type: ignore[index]  # we asked for connections alone
                under_way.pop(connection).end()  # type: ignore[call-overload]
    finally:
        for child in under_way.values():
            child.end()


class _Child:
    """A process that carries out one run, in which it computes by itself unless it is the one run left, `alone`."""

    def __init__(self, plan: Plan, job: Job, folder: Path, *, alone: bool) -> None:
        run, baseline = job.run, job.baseline
        if not alone:
            run, baseline = (each.model_copy(update={"sim": Sim(processes=1)}) for each in (run, baseline))
        context = multiprocessing.get_context("fork")
        self._name = f"{job.entry}, seed {job.seed}"
        self.connection, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_carry_out, args=(theirs, os.getpid(), self._name, plan, run, baseline, folder / job.folder)
        )
        self._process.start()
        theirs.close()

    def require_done(self) -> None:
        """Raise what the run raised."""
        try:
            error = self.connection.recv()
        except EOFError:
            self._process.join()
            raise RunError(
                f"the process of {self._name} has died (exit code {self._process.exitcode}); is there enough memory? "
                "sim.processes = 1 carries out one run after the other, without such processes"
            ) from None
        if error is not None:
            raise error

    def end(self) -> None:
        self._process.kill()  # what it has left to do is nothing, or nothing that anybody wants
        self._process.join()
        self.connection.close()


def _carry_out(
    connection: Connection, parent: int, name: str, plan: Plan, run: Run, baseline: Run, folder: Path
) -> None:
    gc.freeze()  # our parent's garbage is not ours: a gRPC channel's end waits for a thread that no fork has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the comparison's business: it ends us
    torch.set_num_threads(1)

    def live(_record: Record) -> None:
        if os.getppid() != parent:  # the comparison was killed, and may be called again
            os._exit(1)

    folder.parent.mkdir(parents=True, exist_ok=True)
    _, error = answer_of(lambda: carry_out(run, baseline, plan.equal, plan.budget, folder, live), name)
    connection.send(error)
    os._exit(0)  # exit handlers and buffers are the parent's
