"""Run a whole run file in virtual time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from decentral.accounts import STOPPED, TO_THE_END, accounts_of
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Left, Record
from decentral.leases import LeaseBook
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.pipeline import Line, PhantomStage, TorchStage
from decentral.protocols.protection import Guard
from decentral.replica import Replica, held_out
from decentral.sim.clock import VirtualLoop
from decentral.sim.durations import fleet_of
from decentral.sim.engine import computed, phantoms
from decentral.sim.lean import Timed, timed
from decentral.sim.memory import memory_check
from decentral.sim.watch import UNWATCHED, Watch
from decentral.sim.world import SimWorld

COLLECT_AFTER = 100_000
"""Objects made, less those freed, between two looks for garbage cycles."""


def simulate(
    run: Run,
    *,
    timing_only: bool = False,
    on_record: Callable[[Record], None] | None = None,
    until: Callable[[Record], bool] | None = None,
    watch: Watch = UNWATCHED,
) -> Outcome:
    """Return what a run comes to in virtual time. The same run gives the same records, bit for bit.

    `timing_only` skips all tensor work: times, traffic and round outcomes alone. `on_record` sees every record as it is
    made; where no messages are needed to tell the times (`decentral.sim.lean`), that is at the end. `until` is asked of
    every record whether the run is to stop there and then; whoever is in it leaves "stopped", as it is; if a stage of
    the model is lost just then, there is none to look at and `after` is empty. `watch` says how closely to look. Raises
    `DecentralError` for what is the user's to mend, such as a fleet of which nobody is left, and `VerificationError` if
    the run contradicts itself.
    """
    task = run.make_task()
    records: list[Record] = []

    def record_and_tell(item: Record) -> None:
        records.append(item)
        if on_record is not None:
            on_record(item)
        if until is not None and until(item):
            loop.call_soon(world.stop)

    record = records.append if on_record is None and until is None else record_and_tell
    with _threads(run.real.threads), _rare_collections(), ExitStack() as stack:
        before = {} if timing_only else held_out(task, run.seed)  # first: this is where missing data shows
        replicas = phantoms(run, task) if timing_only else stack.enter_context(computed(run, task))
        row = replicas[: run.pipeline.stages]
        for replica in row:
            run.rule.check_layout(replica.layout)
        parameters = sum(replica.layout.size for replica in row)
        fleet = fleet_of(run, task, parameters)
        if timing_only and until is None and watch == UNWATCHED:
            times = timed(run, fleet, row[0].layout)
            if times is not None:
                return _told(run, times, on_record)
        loop = VirtualLoop()
        peers: list[Peer] = []
        book = LeaseBook(run.batch_size, run.leased_samples(task)) if run.leases else None
        world = SimWorld(loop, fleet, run.seed, record, watch, book, run.pipeline.grid)
        check_memory = memory_check(run, task, row)
        loop.at_instant_end(lambda: check_memory(peers))  # rules make their slots before the first step
        try:
            loop.run_until_complete(_run(world, run, replicas, peers, evaluates=not timing_only, spans=watch.spans))
            traffic = world.traffic()
            outcome = Outcome(records, loop.time(), traffic=traffic, grid=run.pipeline.grid)
        finally:
            loop.close()
        check_memory(peers)  # codecs make theirs in the first round
        outcome.verify()
        finished = _finished(outcome, run)
        outcome.accounts = accounts_of(run.fleet, records, outcome.seconds, traffic)
        if not timing_only:
            outcome.params = {peer.id: peer.params for peer in peers if peer.id in finished}
            outcome.slots = {peer.id: peer.slots for peer in peers if peer.id in finished}
            outcome.before = before
            outcome.assemble = run.pipeline.assemble(task, run.seed, run.batch_size)
            if not outcome.grid.missing(finished):
                outcome.after = held_out(task, run.seed, outcome.merged())
    return outcome


def _told(run: Run, times: Timed, on_record: Callable[[Record], None] | None) -> Outcome:
    """Return what a run came to whose times are known, and tell of its records."""
    outcome = Outcome(times.records, times.seconds, traffic=times.traffic)

    def told() -> Iterator[Record]:
        for record in outcome.verified():
            if on_record is not None:
                on_record(record)
            yield record

    outcome.accounts = accounts_of(run.fleet, told(), times.seconds, times.traffic)
    return outcome


async def _run(
    world: SimWorld, run: Run, replicas: list[Replica], peers: list[Peer], evaluates: bool, spans: bool
) -> None:
    def make(worker: int) -> Peer:
        replica = replicas[worker]
        replica.abandon()
        stage = replica if isinstance(replica, (TorchStage, PhantomStage)) else None
        peer = Peer(
            world,
            replica,
            world.members,
            worker=worker,
            seed=run.seed,
            steps=run.steps,
            evaluate_every=run.evaluate_every if evaluates else 0,
            patience_s=run.patience_s,
            norm_limit=run.norm_limit,
            spans=spans,
            loading_s=(lambda: 0.0) if spans else None,  # batches take no virtual time
            crowd=world.crowd,
            cohort=world.cohort,
            began_s=0.0,
            lease=world.lease if run.leases else None,
            bounded=run.epochs is not None,
            column=run.pipeline.grid.column(worker, run.fleet.size),
            room_bytes=stage.room_bytes if stage else 0,
            cuts=run.cuts_phases,
        )
        if stage is not None:
            peer.row = Line(peer, stage, run.pipeline, world.fleet, recovers=run.takes_newcomers)
        if run.parity.workers is not None and evaluates:  # nobody has a state where there are no tensors
            Guard(peer, run.parity, run.fleet.places())
        peers.append(peer)
        return peer

    await world.run(make, run.rule)


def _finished(outcome: Outcome, run: Run) -> set[int]:
    """Return the workers that did all their steps, or were there when the run was stopped.

    Raises `ConfigError` if the run was not stopped and there are none, or none that hold one of the stages.
    """
    left = [record for record in outcome.records if isinstance(record, Left)]
    finished = {record.worker for record in left if record.reason in TO_THE_END}
    missing = outcome.grid.missing(finished)
    if missing and not any(record.reason == STOPPED for record in left):
        last, who = (
            left[-1],
            "nobody" if run.pipeline.stages == 1 or not finished else f"nobody with stage {missing[0]}",
        )
        raise ConfigError(
            f"fleet: {who} is left at the end. The last of {run.fleet.size} workers, worker {last.worker}, went at "
            f"{last.time_s:g} s after {last.step} of {run.steps} local steps: {last.reason}"
        )
    return finished


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
