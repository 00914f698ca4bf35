"""The replicas of a simulated run, and where they are computed."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from decentral.config import Run
from decentral.errors import ConfigError, RunError
from decentral.pipeline import PhantomStage
from decentral.replica import PhantomReplica, Replica, TorchReplica, initial_model
from decentral.sim.engine.memory import Arena
from decentral.sim.engine.pool import Pool
from decentral.sim.engine.pooled import PooledReplica
from decentral.state import Layout, layout_of
from decentral.task import Task

PAYS_S = 3.0
"""Seconds of local steps from which on processes are worth the tenths of a second that it takes to begin them."""
PAYS_STEP_S = 2e-4
"""Seconds of a local step below which the way to another process costs more than it brings."""


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

    Stages are computed here. Raises `ConfigError` if processes are asked for that this system cannot have, and as
    `cut_of` if the model cannot be cut.
    """
    if run.pipeline.stages > 1:
        cut = run.pipeline.cut(task, run.seed, run.batch_size)
        yield [run.make_stage(task, cut, worker) for worker in range(run.fleet.size)]
        return
    first = initial_model(task, run.seed)
    processes = _processes(run, task, first)
    if processes > 1:
        arena = Arena()
        local = [_replica(run, task, first, worker, arena) for worker in range(run.fleet.size)]
        for replica in local:
            replica.move_state(arena.copy_of)
        try:
            pool = Pool(local, processes)
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


def _replica(run: Run, task: Task, first: nn.Module, worker: int, arena: Arena | None = None) -> TorchReplica:
    size = layout_of(first).size
    return TorchReplica(
        task,
        run.inner,
        worker=worker,
        seed=run.seed,
        batch_size=run.batch_size,
        total_steps=run.steps,
        model=copy.deepcopy(first),
        storage=(arena.zeros((size,)), arena.zeros((size,))) if arena else None,
    )


def _processes(run: Run, task: Task, first: nn.Module) -> int:
    """Return how many processes shall compute; 1: none but this one."""
    asked = run.sim.processes
    able = hasattr(os, "fork") and run.real.threads == 1
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = min(cores, run.fleet.size) if able else 1
        return asked if asked > 1 and _pays(run, task, first) else 1
    if asked > 1 and not able:
        raise ConfigError(f"sim.processes: {asked}, but only 1 works on this system or with real.threads above 1")
    return min(asked, run.fleet.size)


def _pays(run: Run, task: Task, first: nn.Module) -> bool:
    """Say whether the run's local steps take long enough, by the forward pass of one of them."""
    trial = _replica(run, task, first, 0)
    trial.loss(0)  # the first one reads data and warms up
    began = time.perf_counter()
    trial.loss(0)
    step_s = 3 * (time.perf_counter() - began)  # the backward pass costs twice as much
    return step_s > PAYS_STEP_S and step_s * run.steps * run.fleet.size > PAYS_S
