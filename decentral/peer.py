"""`Peer`: all that a sync rule may know of the world. `World`: all that differs between the two worlds.

A rule is written against `Peer` alone. `Peer` is one concrete class; the simulator and the real runtime give it a
replica to train and a `World` that says how long work takes, how bytes travel and how rounds are decided. Time is the
event loop's, so `asyncio.sleep` and `Peer.now` are virtual in the simulator.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from decentral.errors import PeerGone
from decentral.inner import Inner
from decentral.journal import (
    Counterfactual,
    Evaluated,
    Joined,
    Left,
    Lost,
    Metered,
    Record,
    Refused,
    Settled,
    Sketched,
    Spent,
    Synced,
    Trained,
)
from decentral.lateness import Lateness
from decentral.members import Ballot, Decision, Members
from decentral.meter import Meter
from decentral.replica import BatchId, Replica, Spans, seed_of
from decentral.sketch import sketch_of
from decentral.snapshot import BUFFER, INNER, PARAMS, SLOT, STATISTICS, Life, Snapshot
from decentral.speeds import TOLD, Speeds
from decentral.state import Layout
from decentral.stock import Lessor, Stock
from decentral.wire import SIGNAL, FrameError, Packet, Refusal, Tag, largest_packet, signal

T = TypeVar("T")

ROUNDS_A_STEP = 16
MORE_ROUNDS = 1024
"""No rule has more rounds than the first, for each local step of anybody, and the second: who names more is lying."""
LARGE = 1 << 14
"""Bytes from which on a packet's time on the way tells of the line's width: that of smaller ones is latency."""
METER_S = 1.0
"""Seconds between two accounts of a worker in the journal."""
ASIDE = 1 << 16
"""Elements from which on coding is worth the way to another thread."""
UNCLAIMED_MODELS = 8
"""Models in float32 that one worker may send ahead before we ask for them."""
UNCLAIMED_BYTES = 1 << 20
"""Room for small packets besides."""
CALL = Tag("call", 0)
"""Under this tag who must leave calls the others to the round at hand."""
PREEMPTED = "preempted"
"""Why a worker has left that was told in time."""


Gate = Callable[[], Awaitable[None]]
"""Returns when a part of the model may be used."""


class Layerwise(Protocol):
    """Local phases that begin and end with one layer after the other."""

    def phase(
        self,
        peer: Peer,
        steps: int,
        pieces: Sequence[Spans],
        gates: Mapping[Spans, Gate],
        work: Callable[[], object],
    ) -> AsyncIterator[int]:
        """Run `work`, which is worth so many local steps, no part of the model before its gate; yield what is final."""


class Host(Protocol):
    """Who lets newcomers in beside a rule."""

    def rest(self) -> None:
        """The worker is between two rounds, about to train, or between two local steps."""

    def rest_before_update(self) -> None:
        """The worker waits, between the rounds on a gradient and the update by what they came to."""

    def decline(self) -> None:
        """The worker is about to leave: who waits for its state had better ask somebody else."""

    async def settled(
        self, channel: str, number: int, decision: Decision, means: Sequence[Tensor], *, cumulative: bool
    ) -> None:
        """A round has come to `decision`, and to these means if it was not skipped; `cumulative` as `Round` has it."""


class Keeper(Protocol):
    """Who keeps the worker's state beside a rule."""

    def rest(self) -> None:
        """The worker is between two rounds, about to train."""


class Estate(Protocol):
    """What of the worker's own is another's when it leaves."""

    async def hand_on(self) -> None:
        """The worker is at rest, and trains no more."""


class Guard(Protocol):
    """Who can give back to a newcomer what it was alone in an earlier life."""

    async def entered(self) -> None:
        """The newcomer has its host's state, and has not begun the rule."""


class Row(Protocol):
    """The stages of a replica, one of which is the worker's."""

    stage: int
    """Which one, counted from 0."""

    @property
    def evaluates(self) -> bool:
        """Whether it is this replica that evaluates."""

    @property
    def waits(self) -> bool:
        """Whether the worker does nothing but wait for the others, in the midst of a local phase."""

    @property
    def updates(self) -> bool:
        """Whether it is between the round on a gradient and the update by what that came to."""

    async def enter(self, holds: bool) -> None:
        """Find a newcomer's place, who `holds` what the others of its column do, or has nothing yet."""

    async def catch_up(self, step: int) -> None:
        """Go through local steps before `step` that the others of the row have still to do."""

    async def train(self, step: int, steps: int) -> float | None:
        """Do so many local steps from `step` on, together; return their mean loss where it is known."""

    async def gradient(self, step: int) -> float | None:
        """Fill `grads` with our part of that step's gradient; return its loss where it is known."""

    async def update(self, step: int) -> None:
        """One step of the inner optimiser, together."""

    async def evaluate(self) -> dict[str, float] | None:
        """Return the held-out metrics of all stages together at one of them, None at the others."""


class Guide(Protocol):
    """Who tells a newcomer what it has missed."""

    lost: bool
    """Whether it can tell no more, though the newcomer needs it: it must come anew."""

    async def outcome(self, channel: str, number: int, like: Sequence[Tensor]) -> list[Tensor] | None:
        """Return what a round came to in which the newcomer took no part; None if it was skipped."""


class World(Protocol):
    """What the simulated and the real world do differently for a worker."""

    @property
    def layerwise(self) -> Layerwise | None:
        """How local phases run layer by layer; None: each is one block."""

    async def compute(self, peer: Peer, steps: float, work: Callable[[], T]) -> T:
        """Run `work`, which is worth so many local steps of the worker's time."""

    async def train(self, peer: Peer, step: int, steps: int) -> tuple[int, float | None]:
        """Have the replica do `steps` local steps from `step` on; return how many were done and their mean loss."""

    def interrupt(self, peer: Peer) -> None:
        """Have `train`, if it is under way, return after the local step at hand: some worlds cannot always."""

    async def aside(self, peer: Peer, numel: int, work: Callable[[], T]) -> T:
        """Run `work`, which codes or merges so many elements for the network, beside whatever else goes on."""

    def backward(self, peer: Peer, fragments: Sequence[Spans], batch: BatchId) -> AsyncIterator[int]:
        """Run one gradient of the replica on that batch, yielding fragments as they become final."""

    def send(self, peer: Peer, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None]:
        """Start sending; the future ends when the packet has arrived, or with `PeerGone`."""

    async def vote(self, peer: Peer, ballot: Ballot) -> Decision:
        """Hand in a vote and wait for the decision."""

    def record(self, record: Record) -> None:
        """Append to the journal."""


class Peer:
    """One worker's view of the run. Made by a world; used by a rule.

    Attributes that a rule reads: `id`, `members` (newest known), `cohort` (all who may ever be in the run), `seed`,
    `params` and `grads` (`[P]` float32, change them in place), `layout`, `step` (local steps done), `samples` (trained
    on in these steps), `patience_s` (default deadline of a receive), `norm_limit` (a contribution of more than so many
    times the usual norm is refused; 0: none), `speeds` (how long local steps take: ours, and as others have told).
    """

    def __init__(
        self,
        world: World,
        replica: Replica,
        members: Members,
        *,
        worker: int,
        seed: int,
        steps: int,
        evaluate_every: int = 0,
        patience_s: float = 60.0,
        norm_limit: float = 0.0,
        spans: bool = False,
        cohort: Members | None = None,
        began_s: float | None = None,
        crowd: Crowd | None = None,
        lease: Lessor | None = None,
        bounded: bool = False,
        loading_s: Callable[[], float] | None = None,
        column: tuple[int, ...] = (),
        room_bytes: int = 0,
        cuts: bool = False,
    ) -> None:
        """Make a worker's view. Workers that are told of changes together share a `crowd`; alone, call `changed`.

        `column` are those of the run who hold what this worker holds of the model; empty: all do. Of one worker packets
        of `room_bytes` may wait here besides some of the size of a model.

        `loading_s` says how long getting batches has taken, for accounts in the journal (None: there are none). `lease`
        asks for samples of the stream that all share, which ends if it is `bounded`; None: each has its own. `cuts`: a
        local phase may end early for the sake of a worker that must leave.
        """
        self._world = world
        self._replica = replica
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time() if began_s is None else began_s
        self._mail = Mailbox(self._loop, UNCLAIMED_MODELS * 4 * replica.layout.size + UNCLAIMED_BYTES + room_bytes)
        self._refused: Counter[tuple[int, Refusal]] = Counter()
        self._rounds: dict[str, int] = {}
        self._settled: dict[str, int] = {}
        self._unsettled: set[tuple[str, int]] = set()
        self._declines: dict[str, Callable[[int, Tag], None]] = {}
        self._slots: dict[str, Tensor] = {}
        self._own_slots: set[str] = set()
        self._restored: set[str] = set()  # slots that nobody has asked for since
        self._tasks: set[asyncio.Task[Any]] = set()
        self._main: asyncio.Task[Any] | None = None
        self._failure: BaseException | None = None
        self._stopped = False
        self._budget = steps
        self._evaluate_every = evaluate_every
        self.next_evaluation = 0  # the local step at which it is due, if it is ours to do
        self.has_evaluated = False
        self.id = worker
        self.seed = seed
        self._crowd = crowd or Crowd(members)
        self._everybody = members
        self._column = column
        self._members = members.party("", column)
        self.cohort = (cohort or members).party("", column)
        self.step = 0
        self.samples = 0
        self.patience_s = patience_s
        self._lateness = Lateness(patience_s)
        self.norm_limit = norm_limit
        self.largest_packet = largest_packet(replica.layout.size)
        self.meter = Meter(self._loop.time, self._record_spent if spans else None)
        self._loading_s = loading_s
        self._metered_s = self.now()
        self._sent: dict[int, tuple[int, float]] = {}  # to whom since then: bytes, seconds on the way
        self.speeds = Speeds()
        self._measured_s = 0.0  # of computing, that `speeds` has heard of
        self._warmed_up = 0  # local steps under way that it has heard of
        self._then: Callable[[], object] | None = None  # is called when local steps have been measured
        self.records = 0
        self.host: Host | None = None
        self.keepers: list[Keeper] = []
        self.held: Snapshot | None = None  # what it left with, when all leave at one point
        self.estate: dict[str, Estate] = {}
        self.guard: Guard | None = None
        self.guide: Guide | None = None
        self.row: Row | None = None
        self._spare: dict[str, Tensor] = {}  # of the last whole snapshot, for the next one
        self._stock = None if lease is None else Stock(self, replica, lease, bounded=bounded)
        self._words: set[asyncio.Future[None]] = set()  # on their way, that settle what was trained on
        self.leaves = False
        self._may_cut = cuts
        self._is_cut = self._is_asked = False  # the local phase under way: to end early; to pause for a newcomer
        self._callers: set[int] = set()

    @property
    def everybody(self) -> Members:
        if self._crowd.members.epoch > self._everybody.epoch:
            self.changed(self._crowd.members)
        return self._everybody

    @property
    def members(self) -> Members:
        if self._crowd.members.epoch > self._everybody.epoch:
            self.changed(self._crowd.members)
        return self._members

    # -- the replica ---------------------------------------------------------------------------------------------

    @property
    def params(self) -> Tensor:
        """The live parameters, `[P]` float32. Change them in place, and never while `train` runs."""
        return self._replica.params

    @property
    def grads(self) -> Tensor:
        """The gradient that `backward` left and `apply_update` takes, `[P]` float32."""
        return self._replica.grads

    @property
    def layout(self) -> Layout:
        return self._replica.layout

    @property
    def replica(self) -> Replica:
        """The model and inner optimiser behind `params`; for worlds, not for rules."""
        return self._replica

    @property
    def slots(self) -> dict[str, Tensor]:
        """Every slot made so far, by name; saved with the replica."""
        return self._slots

    def slot(self, name: str, like: Tensor | None = None, *, own: bool = False) -> Tensor:
        """Return the rule's buffer of that name: a copy of `like` (`[P]` zeros if None) when asked for first.

        What is the worker's `own`, such as what a codec has left unsent, is not handed to a newcomer.
        """
        if name not in self._slots:
            self._slots[name] = self._replica.new_slot(like)
            if own:
                self._own_slots.add(name)
        elif name in self._restored:  # it came from host memory, and only who asks knows where it belongs
            self._restored.discard(name)
            self._slots[name] = self._slots[name].to(self.params if like is None else like)
        return self._slots[name]

    def inner_state(self, name: str) -> Tensor:
        """Return a running mean that the inner optimiser keeps, `[P]`: change it in place, never while `train` runs.

        `inner.momenta` and `inner.variances` say which there are; zeros before the first step. With offloading it is on
        the model's device while `params` are not. Raises `ConfigError` if the inner optimiser keeps none of that name.
        """
        return self._replica.inner_state(name)

    # -- local work ----------------------------------------------------------------------------------------------

    @property
    def inner(self) -> Inner:
        """The inner optimiser's hyper-parameters."""
        return self._replica.inner

    def learning_rate(self, step: int) -> float:
        """Return the inner learning rate of local step `step`, counted from 0; after the last step that one's."""
        return self.inner.lr_at(min(step, self._budget - 1), self._budget)

    def set_learning_rate(self, lr: float) -> None:
        """Change `inner.lr` (above 0), which the schedule is a share of, from the next local step on.

        Never while `train` runs. It is not kept with the slots: a rule that changes it does so again when it begins.
        """
        self._replica.set_learning_rate(lr)

    @property
    def budget(self) -> int:
        """Local steps that the run file gives each worker: what schedules and learning rates are planned for."""
        return self._budget

    @property
    def steps_left(self) -> int:
        """Local steps that this worker will still do. With leases the run may end before the budget is spent."""
        if self._stock is None or self._stock.last_step is None:
            return self._budget - self.step
        return max(0, min(self._budget, self._stock.last_step) - self.step)

    async def train(self, steps: int) -> int:
        """Do `steps` local steps, fewer if the budget ends; return how many, 0 when it was spent before.

        Fewer too if a worker must leave that would not live to see the end of the phase (see `leave`). With leases,
        steps for which the stream has no samples left are missed. Raises `TaskError` when the task raises or a loss is
        not finite.
        """
        steps = min(steps, self.steps_left)
        if steps <= 0:
            return 0
        supplied = 0
        if self.row is not None:
            await self.row.catch_up(self.step)
        if not self.follows or self.row is not None:  # the others of its row need a newcomer's work at once
            await self._rest()
            if self._evaluate_every:
                await self._evaluate_if_due()
            supplied = steps if self._stock is None else await self._supply(self._stock, steps)
        steps = min(steps, self.steps_left)
        if supplied:
            began = self.now()
            if self.row is None:
                done, loss = await self._phase(supplied)
                if done < supplied:
                    steps = supplied = done
            else:
                loss = await self.row.train(self.step, supplied)
            if supplied > self.steps_left:  # `ends` was called meanwhile
                steps = supplied = self.steps_left
            if supplied:
                self._trained(supplied, began, loss)
                await self._sketch_if_due(supplied)
        self.miss(steps - supplied)
        await self._look_ahead()
        return steps

    async def train_in_pieces(
        self, steps: int, pieces: Sequence[Spans], gates: Mapping[Spans, Gate]
    ) -> AsyncIterator[int]:
        """Do `steps` local steps; yield a piece's index as soon as its last update is done, nothing if none are left.

        `gates[spans]` may change these elements of `params`, and is awaited before they are used. In a world that
        trains in one block all gates come first and all pieces last: the same bits, later. A piece may be yielded
        before `step` counts these steps. Raises `TaskError` as `train` does.
        """
        layerwise, steps = None if self.follows else self._world.layerwise, min(steps, self.steps_left)
        if layerwise is not None and self._stock is not None and await self._supply(self._stock, steps) < steps:
            layerwise = None
        if layerwise is None or self._evaluation_is_due:
            for gate in gates.values():
                await gate()
            gates = {}
        if layerwise is None:
            if await self.train(steps):
                for index in range(len(pieces)):
                    yield index
            return
        if steps <= 0:
            return
        await self._rest()
        await self._evaluate_if_due()
        losses: list[float | None] = []
        before = self.meter.seconds["compute"]
        self.meter.begin_work("compute")
        try:
            async for index in layerwise.phase(
                self,
                steps,
                pieces,
                {spans: partial(self._idle, gate) for spans, gate in gates.items()},
                lambda: losses.append(self._replica.train(self.step, steps)[1]),
            ):
                yield index
        finally:
            self.meter.end_work()
        busy_s = self.meter.seconds["compute"] - before
        self._trained(steps, self.now() - busy_s, losses[0])
        await self._sketch_if_due(steps)
        await self._look_ahead()

    async def backward(self, fragments: Sequence[Spans], batch: BatchId | None = None) -> AsyncIterator[int]:
        """Compute one gradient into `grads`; yield each fragment's index as soon as its part is final.

        On our own next batch, or on that of any worker at any local step. Yields nothing when the budget is spent.
        Follow it with `apply_update`. Raises `TaskError` as `train` does.
        """
        if self.steps_left <= 0:
            return
        if self.row is not None:
            await self.row.catch_up(self.step)
        self._backward_missed = self.follows and self.row is None
        if not self._backward_missed:
            await self._rest()
            await self._evaluate_if_due()
            if self._stock is not None and not await self._supply(self._stock, 1):
                self._backward_missed, self._backward_loss = True, None
                self.grads.zero_()
        if self._backward_missed:
            for index in range(len(fragments)):
                yield index
            return
        if self.row is not None:
            self.backward_done(await self.row.gradient(self.step))
            for index in range(len(fragments)):
                yield index
            return
        self.meter.begin_work("compute")
        try:
            async for index in self._world.backward(self, fragments, batch or BatchId(self.id, self.step)):
                yield index
        finally:
            self.meter.end_work()

    async def apply_update(self) -> None:
        """One step of the inner optimiser on `grads`."""
        if self.row is None:
            await self.work("compute", 0.0, lambda: self._replica.update(self.step))
        else:
            await self.row.update(self.step)
        self._trained(1, self.now(), self._backward_loss, missed=self._backward_missed)
        if not self._backward_missed:
            await self._sketch_if_due(1)
        await self._look_ahead()

    def miss(self, steps: int) -> None:
        """Count so many local steps, fewer if the budget ends, that rounds went on without; no sample is trained on."""
        steps = min(steps, self.steps_left)
        if steps > 0:
            self._trained(steps, self.now(), None, missed=True)

    async def loss(self) -> float:
        """Return the loss of the current parameters on the next batch, without a gradient; 0 if there is no batch."""
        if self._stock is not None:
            self._backward_missed = not await self._supply(self._stock, 1)
            if self._backward_missed:
                return 0.0
            self._stock.computed()
        return await self.work("compute", 1 / 3, lambda: self._replica.loss(self.step))

    async def evaluate(self, mean_of: Members | None = None) -> dict[str, float]:
        """Return the task's held-out metrics at the current parameters, and journal them.

        Of a model cut into stages the first one gets and journals them; the others return nothing.

        `mean_of` says whose mean the parameters are, if they are one group's of several or nobody is to adopt them: the
        journal then keeps the metrics apart from those of the run.
        """
        if self.row is None:
            metrics = await self.work("evaluate", 0.0, self._replica.evaluate)
        else:
            told = await self.row.evaluate()
            if told is None:
                return {}
            metrics = told
        now, worker, step = self.now(), self.id, self.step
        if mean_of is None:
            self.record(Evaluated(time_s=now, worker=worker, step=step, metrics=metrics))
        else:
            self.record(Counterfactual(time_s=now, worker=worker, step=step, members=mean_of.ids, metrics=metrics))
        return metrics

    @property
    def statistics(self) -> Tensor:
        """The running means of the model's batch normalisations, then their variances: `[S]` float32, a copy.

        Empty if it has none. Assign them to have the model take them over; never while `train` runs.
        """
        return self._replica.statistics()

    @statistics.setter
    def statistics(self, values: Tensor) -> None:
        self._replica.set_statistics(values)

    async def estimate_statistics(self, batches: int) -> None:
        """Replace `statistics` by what they are at the current parameters over so many of the batches seen last."""
        steps = batches / 3  # forward passes alone
        await self.work("compute", steps, lambda: self._replica.estimate_statistics(self.step, batches))

    # -- talk ----------------------------------------------------------------------------------------------------

    def send(self, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None]:
        """Start sending `packet`; the future is done when it has arrived, or fails with `PeerGone`.

        Whoever does not await it need not look at its failure: the receiver's side of the exchange will tell. Raises
        `ValueError` for a packet that nobody takes.
        """
        if packet.nbytes > self.largest_packet:
            raise ValueError(
                f"'{tag.channel}', {tag.part}: a packet of {packet.nbytes} bytes, and nobody takes more than "
                f"{self.largest_packet}, twice the longest vector; send it in parts"
            )
        arrived = self._world.send(self, to, tag, packet)
        if self._loading_s is not None and packet.nbytes >= LARGE:
            arrived.add_done_callback(partial(self._has_sent, to, packet.nbytes, self.now()))
        return arrived

    def tell_speed(self) -> None:
        """Tell everybody in the run how long our local steps take, if that is known."""
        if self.speeds.own is not None:
            for worker in self.everybody:
                if worker != self.id:
                    self.send(worker, TOLD, self.speeds.packet())

    def probe(self, then: Callable[[], object] = lambda: None) -> None:
        """Measure how long a local step of the next phase takes, and call `then`.

        If nothing is known of it yet, the phase's first step, which warms up, is not counted.
        """
        self._then = then

    async def aside(self, numel: int, work: Callable[[], T]) -> T:
        """Return what `work` returns, which encodes, decodes or merges `numel` elements.

        If they are many it runs in a thread of its own in the real world, so that packets go on coming and going.
        """
        return await self._world.aside(self, numel, work) if numel >= ASIDE else work()

    async def recv(
        self, source: int | None, tag: Tag, timeout_s: float | None = None, among: Members | None = None
    ) -> tuple[int, Packet]:
        """Return (source, packet) of the next packet with that tag; `source=None` takes anyone's.

        Waits `timeout_s` seconds at most (`patience_s` if None). Raises `TimeoutError` at the deadline and `PeerGone`
        when `source` is no member, or stops being one while we wait; likewise when any of those is gone `among` whom
        the packet is exchanged, for what they do together cannot succeed any more.
        """
        arrived = self._mail.take(source, tag)
        if arrived is not None:
            return arrived
        if source is not None and source not in self.everybody:
            raise PeerGone(f"worker {source} is not in the run")
        if among is not None:
            for worker in self.everybody.departed[len(among.departed) :]:
                if worker in among:  # it may be back by now, but not in what these do together
                    raise PeerGone(f"worker {worker} is not in the run")
        wait = self._mail.wait(source, tag, self.patience_s if timeout_s is None else timeout_s, among)
        self._crowd.began(wait, self)
        try:
            return await wait.future
        except BaseException:  # a deadline, a death, or the rule has lost interest
            self._mail.forget(tag, wait)
            raise
        finally:
            self._crowd.ended(wait)

    async def recv_part(self, source: int, tag: Tag, among: Members) -> Packet:
        """Return what `source` brings to a round that it settles with `among`; raises as `recv`.

        Waits `patience_s` seconds, or as long as `source` is known to need (see `Lateness`). For what depends on
        `source` alone: whoever waited longer for what others must send to `source` first would outlast their round.
        """
        since_s = self.now()
        try:
            return (await self.recv(source, tag, self._lateness.allowed_s(source, tag.channel), among))[1]
        except TimeoutError:
            self._lateness.missed(source, tag.channel, tag.round, since_s)
            raise

    def close(self, channel: str, round_: int) -> None:
        """Drop packets of `channel` for rounds up to `round_`, those that are here and those that will come."""
        answer = self._declines.get(channel)
        for source, tag in self._mail.close(channel, round_):
            if answer is not None:
                answer(source, tag)

    def decline(self, channel: str, answer: Callable[[int, Tag], None]) -> None:
        """Have `answer(source, tag)` called for what comes on `channel` and nobody asks for while its round lasts."""
        self._declines[channel] = answer

    async def vote(self, ballot: Ballot) -> Decision:
        """Hand in this worker's vote on an attempt at a round; return what all live members are told."""
        if self._column and not ballot.group:
            ballot = replace(ballot, group=self._column)
        decision = await self._world.vote(self, ballot)
        self.changed(decision.now)
        return decision

    def contributes(self, channel: str, round_: int) -> None:
        """The worker has handed something in to a round that is voted on: it is not at rest until the round ends."""
        self._unsettled.add((channel, round_))
        self.hands_in(channel, round_)

    def hands_in(self, channel: str, round_: int) -> None:
        """What the worker has trained on so far goes into that round, or to that server, from now on.

        Its samples are settled when `ended_round`, `handed_in` or `taken_up` says so; until then they may be lost with
        the worker.
        """
        if self._stock is not None:
            self._stock.handed_in((channel, round_))

    def handed_in(self, channel: str, round_: int, *, used: bool) -> None:
        """What `hands_in` was called for has been used by others, or was in vain and will not be handed in again."""
        if self._stock is not None:
            self._stock.ended((channel, round_), Settled if used else Lost)

    def taken_up(self, channel: str, round_: int, words: Sequence[asyncio.Future[None]]) -> None:
        """What `hands_in` was called for is used by others when one of these `words` of ours has arrived; of none: not.

        In the latter case it will be handed in again.
        """
        if self._stock is None:
            return
        if not words:
            self._stock.ended((channel, round_), None)
        for word in words:
            self._words.add(word)
            word.add_done_callback(self._words.discard)
            word.add_done_callback(lambda sent: self._has_come(channel, round_, sent))

    def _has_come(self, channel: str, round_: int, sent: asyncio.Future[None]) -> None:
        if not sent.cancelled() and sent.exception() is None:
            self.handed_in(channel, round_, used=True)

    def party(self, channel: str, group: tuple[int, ...] = ()) -> Members:
        """Return who takes part in the next round of a channel (of `group` alone, if given), as known now."""
        return self.everybody.party(channel, group or self._column)

    def next_round(self, channel: str, *, voted: bool = False) -> int:
        """Begin the next round of a channel and return its number, 1 at first. All members count alike.

        `voted`: it counts for who begins with this worker's state only when it is settled.

        Raises `PeerGone` when the others have declared this worker dead.
        """
        if self.id not in self.everybody:
            raise self.declared_dead()
        begun = self._rounds.get(channel, 0)
        if voted:
            self._settled.setdefault(channel, begun)
        self._rounds[channel] = begun + 1
        return self._rounds[channel]

    # -- time, chance, tasks, journal ----------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the run began for this worker; virtual in the simulator."""
        return self._loop.time() - self._began

    def rng(self, purpose: str, round_: int) -> random.Random:
        """Return a generator that is equal on every worker of the run for the same purpose and round."""
        return random.Random(seed_of(self.seed, purpose, round_))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` beside the rule. It is cancelled when the rule ends; its failure ends the worker at once."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def record(self, record: Record) -> None:
        self.records += 1
        self._world.record(record)

    def refuse(self, source: int, error: FrameError) -> None:
        """Count what `source` sent and we do not take; the journal is told at the end of a round."""
        self._refused[source, error.code] += 1

    def ended_round(
        self, channel: str, round_: int, outcome: str, members: Sequence[int], *, cumulative: bool = True
    ) -> None:
        """Journal what a round came to, and what was refused since the last one, and drop its mail.

        `cumulative`: if it was skipped, what the worker handed in is in its parameters and so in the next round.
        """
        self._unsettled.discard((channel, round_))
        self._settled[channel] = round_
        self.close(channel, round_)
        self._record_refused()
        self.record(
            Synced(
                time_s=self.now(),
                worker=self.id,
                channel=channel,
                round=round_,
                outcome=outcome,
                members=tuple(members),
                sent_bytes=self.meter.sent_bytes,
            )
        )
        self._record_accounts()
        if self._stock is not None:
            shared = outcome != "skipped" and self.id in members and len(members) > 1
            vain = outcome == "skipped" and not cumulative
            self._stock.ended((channel, round_), Settled if shared else Lost if vain else None)

    # -- for the worlds ------------------------------------------------------------------------------------------

    async def run(self, rule: Callable[[Peer], Coroutine[Any, Any, None]]) -> None:
        """Drive the worker through the rule, from its first record to its last. Raises also what `fail` was told."""
        stage = 0 if self.row is None else self.row.stage
        self.record(Joined(time_s=self.now(), worker=self.id, parameters=self.layout.size, stage=stage))
        self._main = asyncio.current_task()
        try:
            if self._failure is not None:
                raise self._failure
            await rule(self)
            if self._stock is not None:
                self._stock.finish()
            await self._evaluate_if_due(last=True)
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None
        finally:
            self._record_refused()
            self.stop()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def ends(self, step: int) -> None:
        """Who does the local steps does none from `step` on: what is under way is the last, and the budget is spent."""
        self._budget = min(self._budget, step)

    def leave(self, within_s: float = math.inf) -> None:
        """Leave the run when at rest next, about to train: the machine will be taken away in `within_s` seconds.

        Half of them are for local steps. If the worker is still here then, its phase ends with the step at hand, and so
        do the others', whom it calls to the round: the other half is for that. A newcomer that takes part in nothing
        yet goes at once: nobody loses anything with it.
        """
        self.leaves = True
        if self.host is not None:
            self.host.decline()
        if self.follows:
            self.fail(PeerGone(PREEMPTED))
        elif self._may_cut and within_s < math.inf:
            self._loop.call_later(within_s / 2, self._call)

    def _call(self) -> None:
        """Have the round at hand begin now."""
        if not self._stopped:
            for worker in self.members:
                if worker != self.id:
                    self.send(worker, CALL, signal(""))
            self._cut()

    def _called(self, caller: int) -> None:
        """Another worker must leave. It is believed once a life: who always called would let nobody train."""
        if caller not in self._callers:
            self._callers.add(caller)
            self._cut()

    def _cut(self) -> None:
        """End the local phase under way, if any, with the step at hand."""
        if self._may_cut:
            self._is_cut = True
            self._world.interrupt(self)

    def fail(self, error: BaseException) -> None:
        """Have `run` end at once with this error, the first one if there are several; when it is over: nothing."""
        if self._failure is None and not self._stopped:
            self._failure = error
            if self._main is not None:
                self._main.cancel()

    def declared_dead(self) -> PeerGone:
        """Return what ends a worker that is dead to the others: none of them answers it any more."""
        return PeerGone(f"worker {self.id} has been declared dead by the others")

    def stop(self) -> None:
        """Cancel what runs beside the rule: nothing of it goes on from where it waits."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    def left(self, reason: str) -> Left:
        """Return the worker's last record, with its accounts. Only who may come anew as a guest keeps its `guide`."""
        if not self.follows and not (self.guide is not None and self.guide.lost):
            self.guide = None
        self._record_refused()
        self.meter.close()
        self._stock = None  # what arrives now says nothing any more
        self._everybody = self._members = self.cohort  # thousands of leavers must not keep thousands of lists
        return Left(
            time_s=self.now(),
            worker=self.id,
            reason=reason,
            step=self.step,
            seconds=dict(self.meter.seconds),
            sent_bytes=self.meter.sent_bytes,
            received_bytes=self.meter.received_bytes,
            messages_sent=self.meter.messages_sent,
        )

    @property
    def rounds(self) -> dict[str, int]:
        """Rounds begun so far, by channel."""
        return self._rounds

    @property
    def rounds_settled(self) -> dict[str, int]:
        """Rounds that have ended so far, by channel; begun ones, where rounds do not end."""
        return {**self._rounds, **self._settled}

    @property
    def follows(self) -> bool:
        """Whether the worker is a newcomer that takes part in nothing yet."""
        return self.guide is not None and self.everybody.guests.get(self.id) == frozenset()

    def snapshot(self) -> Snapshot:
        """Return what the worker is at rest, less what is its own: what a newcomer begins with."""
        tensors = {PARAMS: self.params.clone()}
        if self.statistics.numel():
            tensors[STATISTICS] = self.statistics
        tensors |= {INNER + name: self._replica.inner_state(name).clone() for name in self._inner_states}
        tensors |= {SLOT + name: self._slots[name].clone() for name in self._slots if name not in self._own_slots}
        return Snapshot(self.step, self.rounds_settled, tensors)

    def whole_snapshot(self) -> Snapshot:
        """Return all that the worker is at rest, in host memory: what it goes on from another day."""
        live = {PARAMS: self.params, **{SLOT + name: slot for name, slot in self._slots.items()}, **self.own_state()}
        life = Life(
            time_s=self.now(),
            samples=self.samples,
            records=self.records,
            inner_steps=self._replica.inner_steps,
            next_evaluation=self.next_evaluation,
            evaluated=self.has_evaluated,
            own_slots=tuple(sorted(self._own_slots)),
            **self.meter.accounts(),
        )
        copies = {name: self._copy(name, values.detach()) for name, values in live.items()}
        return Snapshot(self.step, self.rounds_settled, copies, life)

    def have_back(self, snapshot: Snapshot) -> None:
        """Nobody reads the tensors of that whole snapshot any more: the next one may be made in them.

        Memory that is there already takes a copy five times as fast as new one, page by page.
        """
        self._spare = dict(snapshot.tensors)

    def _copy(self, name: str, values: Tensor) -> Tensor:
        spare = self._spare.pop(name, None)
        if spare is None or spare.shape != values.shape or spare.dtype != values.dtype:
            return values.to("cpu", copy=True)
        return spare.copy_(values)

    def own_state(self) -> dict[str, Tensor]:
        """Return the live tensors that are the worker's alone, by name: buffers, inner optimiser, slots of its own."""
        live = {BUFFER + name: values for name, values in self._replica.buffers().items()}
        live |= {INNER + name: self._replica.inner_state(name) for name in self._inner_states}
        return live | {SLOT + name: self._slots[name] for name in sorted(self._own_slots)}

    def restore_own(self, tensors: Mapping[str, Tensor], inner_steps: int) -> None:
        """Take over tensors that `own_state` returned; the inner optimiser had done so many steps. As `restore`."""
        self._take_over(tensors)
        self._own_slots |= {name.removeprefix(SLOT) for name in tensors if name.startswith(SLOT)}
        self._replica.set_inner_steps(inner_steps)

    def restore(self, snapshot: Snapshot) -> None:
        """Be what the snapshot is of. Raises `PeerGone` if it is of another model or inner optimiser."""
        self._take_over(snapshot.tensors)
        self.stand_at(snapshot.step, snapshot.rounds)
        if snapshot.life is not None:
            self._live_on(snapshot.life)

    def room_for(self, name: str, numel: int) -> Tensor:
        """Return where a tensor of a newcomer's snapshot is in place for `restore`, `[numel]`. Raises as `restore`."""
        if name.startswith(SLOT):
            return self._replica.vector(numel)
        held = {PARAMS: self.params, STATISTICS: self.statistics}
        held |= {INNER + name: self._replica.inner_state(name) for name in self._inner_states}
        return _fitting(held, name, numel)

    def _take_over(self, tensors: Mapping[str, Tensor]) -> None:
        held = {PARAMS: self.params}
        held |= {BUFFER + name: values for name, values in self._replica.buffers().items()}
        held |= {INNER + name: self._replica.inner_state(name) for name in self._inner_states}
        for name, values in tensors.items():
            if name.startswith(SLOT):
                self._slots[name.removeprefix(SLOT)] = values
                self._restored.add(name.removeprefix(SLOT))
            elif name == STATISTICS:
                self.statistics = values
            else:
                _fitting(held, name, values.numel()).copy_(values)

    def _live_on(self, life: Life) -> None:
        """The worker's earlier life was this far."""
        self._began = self._loop.time() - life.time_s
        self.samples = life.samples
        self._replica.set_inner_steps(life.inner_steps)
        self.next_evaluation, self.has_evaluated = life.next_evaluation, life.evaluated
        self._own_slots = set(life.own_slots)
        self.meter.go_on(life.seconds, life.sent_bytes, life.received_bytes, life.messages_sent)
        self._measured_s = self.meter.seconds["compute"]

    @property
    def _inner_states(self) -> tuple[str, ...]:
        return (*self.inner.momenta, *self.inner.variances)

    def stand_at(self, step: int, rounds: Mapping[str, int]) -> None:
        """Have done so many local steps, and begun so many rounds on each channel."""
        self.step = step
        self._replica.set_inner_steps(step)
        self.next_evaluation = step // max(1, self._evaluate_every) * self._evaluate_every + self._evaluate_every
        self._rounds, self._settled = dict(rounds), {}
        for channel, number in rounds.items():
            self.close(channel, number)

    def arrived(self, source: int, tag: Tag, packet: Packet) -> None:
        """A packet has come in. Packets of workers that are no members are dropped."""
        if source not in self.everybody:
            return
        try:
            if tag == TOLD:
                self.speeds.told(source, packet)
                return
            if tag == CALL:
                self._called(source)
                return
            if tag.round > ROUNDS_A_STEP * self._budget * len(self.cohort) + MORE_ROUNDS:
                raise FrameError("future", f"{tag}: no round of this run can have such a number")
            if packet.codec != SIGNAL:
                self._lateness.came(source, tag.channel, tag.round, self.now())
            self._mail.put(source, tag, packet)
        except FrameError as error:
            if error.code == "stale" and tag.channel in self._declines:
                self._declines[tag.channel](source, tag)
            else:
                self.refuse(source, error)

    def changed(self, members: Members) -> None:
        """The membership has changed: waits for those who have gone end with `PeerGone`."""
        if members.epoch > self._everybody.epoch:
            gone = members.departed[len(self._everybody.departed) :]
            self._everybody = members
            self._members = members.party("", self._column)
            self._callers.difference_update(gone)
            if gone and self._mail.waiting:
                self._mail.fail(gone)

    _backward_loss: float | None = None
    _backward_missed = False

    def backward_done(self, loss: float | None) -> None:
        """The world has finished a gradient whose loss this is."""
        self._backward_loss = loss
        if self._stock is not None:
            self._stock.computed()

    def _record_spent(self, kind: str, seconds: float) -> None:
        self.record(Spent(time_s=self.now(), worker=self.id, activity=kind, seconds=seconds))

    def _has_sent(self, to: int, nbytes: int, began: float, arrived: asyncio.Future[None]) -> None:
        if not arrived.cancelled() and arrived.exception() is None:
            before, seconds = self._sent.get(to, (0, 0.0))
            self._sent[to] = before + nbytes, seconds + self.now() - began

    def _record_accounts(self) -> None:
        now = self.now()
        if self._loading_s is None or now - self._metered_s < METER_S:
            return
        sent, self._sent, self._metered_s = self._sent, {}, now
        self.record(
            Metered(
                time_s=now,
                worker=self.id,
                seconds=self.meter.so_far(),
                loading_s=self._loading_s(),
                received_bytes=self.meter.received_bytes,
                sent=tuple((to, *sent[to]) for to in sorted(sent)),
            )
        )

    def _record_refused(self) -> None:
        for (source, code), count in sorted(self._refused.items()):
            self.record(Refused(time_s=self.now(), worker=self.id, source=source, code=code, count=count))
        self._refused.clear()

    def _spawned_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.fail(error)

    async def _rest(self) -> None:
        if self._unsettled:
            return
        if self.leaves and await self._has_handed_in():
            for each in self.estate.values():
                await each.hand_on()
            raise PeerGone(PREEMPTED)
        if self.host is not None:
            self.host.rest()
        for keeper in list(self.keepers):
            keeper.rest()

    def rest_amid_phase(self) -> None:
        """Give newcomers what they wait for as soon as can be, if the worker is in the midst of local steps.

        Of a row it can be when the worker waits for the others, who may wait for the newcomer.
        """
        if self._unsettled:
            return
        if self.row is None:
            self._is_asked = True
            self._world.interrupt(self)
        elif self.host is not None and self.row.waits:
            if self.row.updates:
                self.host.rest_before_update()
            else:
                self.host.rest()

    async def _has_handed_in(self) -> bool:
        """Return whether all that the worker has trained on is settled, as far as leases tell; alone it never will be.

        In gossip a worker may be without a partner for a round, and after a round that was skipped the next one counts.
        """
        if self._stock is None or len(self.members) < 2:
            return True
        if self._words:
            await asyncio.wait(self._words)
        return self._stock.is_settled

    async def _phase(self, steps: int) -> tuple[int, float | None]:
        """Do so many local steps, fewer if the phase is cut short; return how many, and their mean loss.

        Newcomers who ask meanwhile are given the state between two of them, with `step` as the phase began: so they
        count rounds and steps as who gives it, whatever the parameters have come to since.
        """
        self._is_cut = self._is_asked = False
        probes = self._then is not None and self.speeds.own is None and steps > 1
        done, losses = 0, []
        while True:
            wanted = 1 if probes and not done else steps - done
            self.meter.begin_work("compute")
            try:
                more, loss = await self._world.train(self, self.step + done, wanted)
            finally:
                self.meter.end_work()
            if probes and not done:
                self._measure(more)
                self._warmed_up = more
            done += more
            losses.append((more, loss))
            if done == steps or self._is_cut or (more < wanted and not self._is_asked):
                return done, _mean_loss(losses)
            if self._is_asked and self.host is not None:
                self.host.rest()
            self._is_asked = False

    async def _supply(self, stock: Stock, steps: int) -> int:
        """Have samples for that many local steps, fewer if the stream ends, and ask for as many more; return how many.

        The next phase is probably as long as this one: so its samples are here when it begins, unless a phase is
        shorter than the coordinator takes to answer.
        """
        return await stock.provide(self.step, steps, max(0, min(steps, self.steps_left - steps)))

    async def _look_ahead(self) -> None:
        """Learn whether the stream that all share has ended, before the rule asks how many steps are left."""
        if self._stock is not None and self.steps_left:
            await self._stock.look(self.step)

    async def work(self, kind: str, steps: float, work: Callable[[], T]) -> T:
        """Return what `work` returns, which is worth so many local steps of "compute", or of what `kind` says."""
        self.meter.begin_work(kind)
        try:
            return await self._world.compute(self, steps, work)
        finally:
            self.meter.end_work()

    async def _idle(self, gate: Gate) -> None:
        """Await a gate in the midst of computing; the time it takes is not computing."""
        self.meter.end_work()
        await gate()
        self.meter.begin_work("compute")

    def _measure(self, steps: int) -> None:
        """What has been computed since this was last called was so many local steps; 0: something else."""
        computed_s = self.meter.seconds["compute"]
        if computed_s > self._measured_s and steps:
            self.speeds.measured(steps, computed_s - self._measured_s)
        self._measured_s = computed_s
        if self._then is not None and self.speeds.own is not None:
            then, self._then = self._then, None
            then()

    def _trained(self, steps: int, began: float, loss: float | None, missed: bool = False) -> None:
        self.step += steps
        self._measure(0 if missed else steps - self._warmed_up)
        self._warmed_up = 0
        samples = 0 if missed else steps * self._replica.batch_size
        self.samples += samples
        now = self.now()
        self.record(
            Trained(
                time_s=now,
                worker=self.id,
                step=self.step,
                steps=steps,
                samples=samples if self.row is None or self.row.stage == 0 else 0,  # each sample once
                seconds=0.0 if missed else now - began,
                loss=loss,
            )
        )
        self._record_accounts()
        if self._stock is not None and samples:
            self._stock.trained(samples)

    async def _sketch_if_due(self, steps: int) -> None:
        """Journal a sketch of the parameters if an evaluation was due at one of so many local steps, now done."""
        if self._evaluate_every and self.step % self._evaluate_every < steps:
            sketch = await self.work("evaluate", 0.0, lambda: sketch_of(self.params))
            number = self.step // self._evaluate_every
            self.record(Sketched(time_s=self.now(), worker=self.id, number=number, sketch=sketch))

    @property
    def _evaluation_is_due(self) -> bool:
        if not self._evaluate_every or self.step < self.next_evaluation:
            return False
        return self.id == min(self.members, default=self.id) if self.row is None else self.row.evaluates

    async def _evaluate_if_due(self, last: bool = False) -> None:
        """Evaluate between local phases, where the parameters are what the rule wants to go on from.

        The lowest member does it; at the end only the one that did it before, not who becomes lowest as others leave.
        """
        if self.has_evaluated if last else self._evaluation_is_due:
            self.has_evaluated = True
            self.next_evaluation = (self.step // self._evaluate_every + 1) * self._evaluate_every
            await self.evaluate()


def _mean_loss(losses: Sequence[tuple[int, float | None]]) -> float | None:
    """Return the mean of means over so many steps each; None if they are not known."""
    if len(losses) == 1:
        return losses[0][1]
    known = [(steps, loss) for steps, loss in losses if loss is not None]
    return sum(steps * loss for steps, loss in known) / sum(steps for steps, _ in known) if known else None


def _fitting(held: Mapping[str, Tensor], name: str, numel: int) -> Tensor:
    """Return the tensor of that name and length; raises `PeerGone` if there is none."""
    values = held.get(name)
    if values is None or values.numel() != numel:
        raise PeerGone(f"the state has a '{name}' of {numel} elements, which is not what we have")
    return values


class Crowd:
    """Workers that are told together of changes of membership, and who of them waits for whom.

    A simulation has thousands of workers, who leave one by one. Were each told of each leave, it would take the square
    of their number. So only those hear of it at once who wait for who has gone; the others when they look.
    """

    __slots__ = ("_askers", "_partakers", "members")

    def __init__(self, members: Members) -> None:
        self.members = members
        self._askers: dict[int, dict[_Wait, Peer]] = {}  # by whom they wait for
        self._partakers: dict[_Wait, Peer] = {}  # whoever waits for one of several, and needs them all

    def changed(self, members: Members) -> None:
        """The membership has changed: as if every worker's `Peer.changed` were called, in order of workers."""
        gone = members.departed[len(self.members.departed) :]
        self.members = members
        concerned = {peer.id: peer for worker in gone for peer in self._askers.get(worker, {}).values()}
        concerned.update({peer.id: peer for peer in self._partakers.values()})
        for worker in sorted(concerned):
            concerned[worker].changed(members)

    def began(self, wait: _Wait, peer: Peer) -> None:
        """`peer` begins to wait."""
        if wait.among is not None:
            self._partakers[wait] = peer
        elif wait.source is not None:
            askers = self._askers.get(wait.source)
            if askers is None:
                self._askers[wait.source] = {wait: peer}
            else:
                askers[wait] = peer

    def ended(self, wait: _Wait) -> None:
        """Nobody waits there any longer."""
        if wait.among is not None:
            del self._partakers[wait]
        elif wait.source is not None:
            del self._askers[wait.source][wait]


class Mailbox:
    """Packets that came before somebody asked, and askers whose packet has not come.

    Nobody can fill our memory: of one worker it holds `limit` bytes of payload at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float = math.inf) -> None:
        self._loop = loop
        self._limit = limit
        self._arrived: dict[Tag, dict[int, Packet]] = {}
        self._held: Counter[int] = Counter()  # bytes by source
        self.waiting: dict[Tag, list[_Wait]] = {}
        self._check_at = math.inf  # when `_expire` will look at the deadlines next
        self._timer: asyncio.TimerHandle | None = None
        self._closed: dict[str, int] = {}

    def put(self, source: int, tag: Tag, packet: Packet) -> None:
        """Hand the packet to who waits for it, or keep it. Raises `FrameError` if it can be of no use."""
        if tag.round <= self._closed.get(tag.channel, -1):
            if packet.codec == SIGNAL:
                return  # a verdict that nobody waited for
            raise FrameError("stale", f"{tag} is over")
        for wait in self.waiting.get(tag, ()):
            if (wait.source is None or wait.source == source) and not wait.future.done():
                self.forget(tag, wait)
                wait.future.set_result((source, packet))
                return
        arrived = self._arrived.get(tag)
        if arrived is not None and source in arrived:
            raise FrameError("duplicate", f"{tag} came before")
        if self._held[source] + packet.nbytes > self._limit:
            raise FrameError("unclaimed", f"more than {self._limit} bytes that nobody has asked for")
        self._held[source] += packet.nbytes
        if arrived is None:
            self._arrived[tag] = {source: packet}
        else:
            arrived[source] = packet

    def take(self, source: int | None, tag: Tag) -> tuple[int, Packet] | None:
        """Return (source, packet) if it is here; `source=None` takes who came first."""
        arrived = self._arrived.get(tag)
        if arrived is None:
            return None
        if source is None:
            source = next(iter(arrived))
        packet = arrived.pop(source, None)
        if packet is None:
            return None
        self._held[source] -= packet.nbytes
        if not arrived:
            del self._arrived[tag]
        return source, packet

    def wait(self, source: int | None, tag: Tag, timeout_s: float, among: Members | None = None) -> _Wait:
        """Have the wait's future done when the packet comes; whoever does not await it to a good end must `forget`."""
        wait = _Wait(source, self._loop.create_future(), self._loop.time() + timeout_s, among)
        waits = self.waiting.get(tag)
        if waits is None:
            self.waiting[tag] = [wait]
        else:
            waits.append(wait)
        if wait.deadline < self._check_at:
            self._look_at(wait.deadline)
        return wait

    def forget(self, tag: Tag, wait: _Wait) -> None:
        """Nobody waits here any more; does nothing if that is known."""
        waits = self.waiting.get(tag, [])
        if wait in waits:
            waits.remove(wait)
            if not waits:
                del self.waiting[tag]

    def fail(self, gone: Collection[int]) -> None:
        """End every wait for one of these workers, or for what they take part in."""
        for waits in self.waiting.values():
            for wait in waits:
                if wait.future.done():
                    continue
                if wait.source in gone or (wait.among is not None and any(worker in wait.among for worker in gone)):
                    wait.future.set_exception(PeerGone(f"of the workers {sorted(gone)} one is needed here"))

    def close(self, channel: str, round_: int) -> Sequence[tuple[int, Tag]]:
        """Drop these packets; return whose they were, but for signals, which nobody need have waited for."""
        self._closed[channel] = max(round_, self._closed.get(channel, -1))
        if not self._arrived:
            return ()
        dropped = []
        for tag in [tag for tag in self._arrived if tag.channel == channel and tag.round <= round_]:
            for source, packet in self._arrived.pop(tag).items():
                self._held[source] -= packet.nbytes
                if packet.codec != SIGNAL:
                    dropped.append((source, tag))
        return dropped

    def _expire(self) -> None:
        """End the waits whose deadline has come. One timer serves all: most waits end long before their deadline."""
        now, earliest = self._loop.time(), math.inf
        for tag, waits in self.waiting.items():
            for wait in waits:
                if wait.future.done():
                    continue
                if wait.deadline <= now:
                    wait.future.set_exception(TimeoutError(f"nothing came for {tag} before the deadline"))
                else:
                    earliest = min(earliest, wait.deadline)
        self._look_at(earliest)

    def _look_at(self, when: float) -> None:
        """Have `_expire` look at the deadlines at this time, and at no other; at infinity never."""
        if self._timer is not None:
            self._timer.cancel()
        self._check_at = when
        self._timer = self._loop.call_at(when, self._expire) if when < math.inf else None


class _Wait:
    """Somebody who waits for a packet from `source` until `deadline`, in seconds of the loop's clock."""

    __slots__ = ("among", "deadline", "future", "source")

    def __init__(
        self,
        source: int | None,
        future: asyncio.Future[tuple[int, Packet]],
        deadline: float,
        among: Members | None,
    ) -> None:
        self.source = source
        self.future = future
        self.deadline = deadline
        self.among = among
