"""The replicas of a simulated run, and where they are computed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from decentral.config import Run
from decentral.errors import ConfigError, RunError
from decentral.offload import OffloadedReplica
from decentral.pipeline import PhantomStage
from decentral.replica import PhantomReplica, Replica, TorchReplica, initial_model
from decentral.sim.engine.memory import Arena
from decentral.sim.engine.pool import Pool, can_fork, cores
from decentral.sim.engine.pooled import PooledReplica
from decentral.sim.engine.together import SIZES, Together, joined
from decentral.state import Layout, layout_of
from decentral.task import Task

PAYS_S = 3.0
"""Seconds of local steps from which on processes are worth the tenths of a second that it takes to begin them."""
PAYS_STEP_S = 2e-4
"""Seconds of a local step below which the way to another process costs more than it brings."""
SMALL = 1 << 18
"""Parameters of a replica above which computing together is not tried."""
TRIAL_PAYS_S = 15.0
"""Seconds of local steps in a process from which on a trial is worth its two seconds, most of them torch's imports."""


def phantoms(run: Run, task: Task) -> list[Replica]:
    """Return replicas, or their stages, that have sizes alone. Raises as `cut_of` if the model cannot be cut."""
    if run.pipeline.stages > 1:
        cut = run.pipeline.cut(task, run.seed, run.batch_size)
        stages = [run.pipeline.grid.stage(worker) for worker in range(run.fleet.size)]
        return [PhantomStage(cut, stage, run.pipeline.microbatches, run.batch_size, run.inner) for stage in stages]
    with torch.device("meta"):
        layout: Layout = layout_of(initial_model(task, run.seed))
    return [PhantomReplica(layout, run.batch_size, run.inner) for _ in range(run.fleet.size)]


@contextmanager
def computed(run: Run, task: Task) -> Iterator[list[Replica]]:
    """Have real replicas: computed here, or by as many processes as `run.sim` says or as pay. The same bits either way.

    Stages are computed here, and so is everything on a GPU. Raises `ConfigError` if a device or processes are asked
    for that this system cannot have, and as `cut_of` if the model cannot be cut.
    """
    device = _device(run)
    if run.pipeline.stages > 1:
        cut = run.pipeline.cut(task, run.seed, run.batch_size)
        yield [run.make_stage(task, cut, worker) for worker in range(run.fleet.size)]
        return
    first = initial_model(task, run.seed)
    if device.type != "cpu":
        yield [_replica(run, task, first, worker, device=device) for worker in range(run.fleet.size)]
        return
    processes = _processes(run, task, first)
    if processes > 1:
        arena = Arena()
        local = [_replica(run, task, first, worker, arena) for worker in range(run.fleet.size)]
        for replica in local:
            replica.move_state(arena.copy_of)
        try:
            pool = Pool(local, processes, _together(run, task, first, processes))
        except (OSError, RunError) as error:
            if run.sim.processes:
                raise ConfigError(f"sim.processes: {processes} processes cannot be had here: {error}") from error
        else:
            try:
                yield [PooledReplica(replica, pool) for replica in local]
            finally:
                pool.close()
            return
    yield [_replica(run, task, first, worker) for worker in range(run.fleet.size)]


def _device(run: Run) -> torch.device:
    try:
        device = torch.device(run.sim.device)
        torch.empty(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"sim.device: '{run.sim.device}' cannot compute here: {reason}; \"cpu\" can") from error
    if device.type != "cpu" and run.pipeline.stages > 1:
        raise ConfigError(f"sim.device: '{device}', but the stages of a model are simulated on the CPU")
    if device.type != "cpu" and (run.sim.processes or 1) > 1:
        raise ConfigError(f"sim.processes: {run.sim.processes}, but one process asks '{device}' for all there is to do")
    return device


def _replica(
    run: Run,
    task: Task,
    first: nn.Module,
    worker: int,
    arena: Arena | None = None,
    device: torch.device | None = None,
) -> TorchReplica:
    size = layout_of(first).size
    return (TorchReplica if device is None else OffloadedReplica)(
        task,
        run.inner,
        worker=worker,
        seed=run.seed,
        batch_size=run.batch_size,
        total_steps=run.steps,
        device=device,
        model=copy.deepcopy(first),
        storage=(arena.zeros((size,)), arena.zeros((size,))) if arena else None,
    )


def _processes(run: Run, task: Task, first: nn.Module) -> int:
    """Return how many processes shall compute; 1: none but this one."""
    asked = run.sim.processes
    able = can_fork(run.real.threads)
    if asked is None:
        asked = min(cores(), run.fleet.size) if able else 1
        if asked == 1:
            return 1
        step_s = _step_s(run, task, first)
        return asked if step_s > PAYS_STEP_S and step_s * run.steps * run.fleet.size > PAYS_S else 1
    if asked > 1 and not able:
        raise ConfigError(f"sim.processes: {asked}, but only 1 works on this system or with real.threads above 1")
    return min(asked, run.fleet.size)


def _together(run: Run, task: Task, first: nn.Module, processes: int) -> Together | None:
    """Return what computes replicas of a process together, if they are small and many and a trial says that it pays."""
    share = -(-run.fleet.size // processes)
    if share < SIZES[-1] or layout_of(first).size > SMALL:
        return None
    if _step_s(run, task, first) * run.steps * share < TRIAL_PAYS_S:
        return None
    count = next(size for size in SIZES if size <= share)
    return joined(lambda worker: _replica(run, task, first, worker), count)


def _step_s(run: Run, task: Task, first: nn.Module) -> float:
    """Return about how long a local step takes, by the forward pass of one."""
    trial = _replica(run, task, first, 0)
    trial.loss(0)  # the first one reads data and warms up
    began = time.perf_counter()
    trial.loss(0)
    return 3 * (time.perf_counter() - began)  # the backward pass costs twice as much
