"""Run a whole run file in virtual time."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Record
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.replica import PhantomReplica, Replica, TorchReplica, held_out, initial_model
from decentral.sim.clock import VirtualLoop
from decentral.sim.world import SimWorld
from decentral.state import Layout, layout_of
from decentral.task import Task

ALIGNMENT = 16
"""Rows of the stacked state start at multiples of so many float32: vector instructions see in every row what they see
in a worker's own buffer, so both worlds compute the same bits."""

COLLECT_AFTER = 100_000
"""Objects made, less those freed, between two looks for garbage cycles."""


def simulate(run: Run, *, timing_only: bool = False, on_record: Callable[[Record], None] | None = None) -> Outcome:
    """Return what a run comes to in virtual time. The same run gives the same records, bit for bit.

    `timing_only` skips all tensor work: times, traffic and round outcomes alone. `on_record` sees every record as it is
    made. Raises `DecentralError` for what is the user's to mend.
    """
    task = run.make_task()
    records: list[Record] = []

    def record_and_tell(item: Record) -> None:
        records.append(item)
        if on_record is not None:
            on_record(item)

    record = records.append if on_record is None else record_and_tell
    with _threads(run.real.threads), _rare_collections():
        before = {} if timing_only else held_out(task, run.seed)  # first: this is where missing data shows
        replicas = _phantoms(run, task) if timing_only else _stacked(run, task)
        run.rule.check_layout(replicas[0].layout)
        loop = VirtualLoop()
        peers: list[Peer] = []
        try:
            loop.run_until_complete(_run(loop, run, replicas, peers, record, evaluates=not timing_only))
            outcome = Outcome(records, loop.time())
        finally:
            loop.close()
        if not timing_only:
            finished = {item.worker for item in outcome.left() if item.reason == "finished"}
            if not finished:
                raise ConfigError("fleet.events: no worker is left at the end; there is nothing to merge")
            outcome.params = {peer.id: peer.params for peer in peers if peer.id in finished}
            outcome.slots = {peer.id: peer.slots for peer in peers if peer.id in finished}
            outcome.before = before
            outcome.after = held_out(task, run.seed, outcome.merged())
    return outcome


async def _run(
    loop: VirtualLoop,
    run: Run,
    replicas: list[Replica],
    peers: list[Peer],
    record: Callable[[Record], None],
    evaluates: bool,
) -> None:
    world = SimWorld(loop, run.fleet, run.seed, record)
    peers += [
        Peer(
            world,
            replica,
            world.members,
            worker=worker,
            seed=run.seed,
            steps=run.steps,
            evaluate_every=run.evaluate_every if evaluates else 0,
            patience_s=run.patience_s,
            norm_limit=run.norm_limit,
        )
        for worker, replica in enumerate(replicas)
    ]
    await world.run(peers, run.rule)


def _stacked(run: Run, task: Task) -> list[Replica]:
    """Return real replicas whose parameters are the rows of one `[N, P]` tensor."""
    first = initial_model(task, run.seed)
    size = layout_of(first).size
    stride = -(-size // ALIGNMENT) * ALIGNMENT
    rows = torch.zeros(run.fleet.size, stride)
    return [
        TorchReplica(
            task,
            run.inner,
            worker=worker,
            seed=run.seed,
            batch_size=run.batch_size,
            total_steps=run.steps,
            model=copy.deepcopy(first),
            storage=rows[worker, :size],
        )
        for worker in range(run.fleet.size)
    ]


def _phantoms(run: Run, task: Task) -> list[Replica]:
    with torch.device("meta"):
        layout: Layout = layout_of(initial_model(task, run.seed))
    return [PhantomReplica(layout, run.batch_size, run.inner) for _ in range(run.fleet.size)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with as many threads as a worker of the real world would: sums then run in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for garbage cycles a hundred times less often than it does by itself.

    A simulation holds many objects (records, mail, tasks) and makes next to no cycles, so that looking through all of
    them again and again only costs time. Whoever has switched collection off keeps it off.
    """
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(max(before[0], COLLECT_AFTER), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
