"""`Line`: one worker's place in a pipeline, between the stage before and the stage behind."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from decentral.errors import PeerGone
from decentral.fleet import Fleet
from decentral.peer import Peer
from decentral.pipeline.followers import Follower, packed, unpacked
from decentral.pipeline.orders import timetable
from decentral.pipeline.paths import FORWARD_SHARE, Ground, Hop, Path
from decentral.pipeline.reunion import Lost, Place, Reunion
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.stage import Stage, gather
from decentral.protocols.codecs import Codec, Float32
from decentral.wire import SIGNAL, FrameError, Packet, Tag, largest_packet, signal, signal_text

EXACT = Float32()
CHANNEL = "pipeline"
EVALUATION = "evaluation"


class Line:
    """Takes a worker's stage through batches, together with the workers of the other stages: its row.

    If microbatches go through other replicas too, all of them do each step together: the *party*, which is the row
    otherwise. A local step is done by all of it or by none: each says when its gradient is whole, and what its squares
    add up to; the first answers with the norms of the replicas' whole gradients, and then all step. When a worker of
    the party is lost the others wait for it to come again, and do the step that was under way anew (see `Reunion`).
    All raise `PeerGone` when that fails or is not wanted, and `TaskError` when the task raises.
    """

    def __init__(self, peer: Peer, stage: Stage, settings: Pipeline, fleet: Fleet, *, recovers: bool = False) -> None:
        self._peer, self._stage, self._codec, self._order = peer, stage, settings.codec, settings.order
        peer.largest_packet = largest_packet(stage.cut.largest)
        self._grid, self._ways = settings.grid, settings.ways
        self._row, self.stage = self._grid.row(peer.id), self._grid.stage(peer.id)
        everybody = len(peer.cohort) * settings.stages
        self._party = tuple(range(everybody)) if self._ways.crosses else self._row
        self._replicas = tuple(self._grid.replica(worker) for worker in self._party[:: settings.stages])
        self._ground = Ground(stage.cut, self._replicas, stage.microbatches, self._codec, peer.seed, fleet)
        self._drawn: int | None = None  # whose timetable it is
        self._firsts = tuple(range(0, everybody, settings.stages))
        self._place = Place(next=peer.step)
        self._updates: int | None = None  # the local step whose gradient has been reduced, until it is done
        self._entered_at = 0  # the step that the row did next when this worker came back to it
        follows = settings.recovery.follows(stage.cut) if recovers else []
        self._followers = [Follower(stage, each) for each in follows if each.keeper == self.stage]
        self._followed = [each for each in follows if each.stage == self.stage]
        self._keeps_all = settings.recovery.keeps_all
        self._tells_state = False  # the run begins with what its keeper knows
        self._telling: list[asyncio.Future[None]] = []
        self._heard: tuple[int, int] | None = None  # the step, and the losses before it, that followers have heard of
        recovery = settings.recovery if recovers else None
        self._reunion = Reunion(peer, stage, self._party, recovery, self._followers)

    @property
    def evaluates(self) -> bool:
        """Whether this is the row that evaluates: that of the lowest member who holds the first stage."""
        firsts = self._peer.everybody.party("", self._firsts)
        return self._row[0] == min(firsts, default=self._row[0])

    @property
    def waits(self) -> bool:
        """Whether the worker does nothing but wait for others of its row, in the midst of a local phase.

        Once a gradient's step is done it does not count until the rule knows that too: there is no telling where the
        state is between.
        """
        return self._reunion.waits and self._updates in (None, self._place.next)

    @property
    def updates(self) -> bool:
        """Whether it is between the round on a gradient and the update by what that came to."""
        return self._updates is not None

    async def enter(self, holds: bool) -> None:
        """Find a newcomer's place in a row that may be in the midst of a step.

        It `holds` its stage as somebody gave it who has the same one; otherwise its row rebuilds it.
        """
        self._place = Place(next=None, holds=holds)
        await self._reunite()
        self._entered_at = self._next

    async def catch_up(self, step: int) -> None:
        """Go through the steps before `step`, if a worker that has come back is ahead of its row.

        That is for the others' sake, and without an update: whoever has let it in has done these already.
        """
        await self.train(step, 0)

    async def train(self, step: int, steps: int) -> float | None:
        """Do local steps `step .. step + steps - 1`, less those that the row of a worker that has come back has done.

        Return the mean loss of the microbatches that end here, None if none do.
        """
        self._tells_state = True  # a round may have changed what is followed
        losses = []
        while self._next < step + steps:
            at = self._next
            losses.append(await self._pass(at))
            await self._update(at)
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None

    async def gradient(self, step: int) -> float | None:
        """Fill `grads` with the stage's part of local step `step`'s gradient; return as `train`.

        Not if the row of a worker that has come back has done that step.
        """
        return await self._pass(step) if step >= self._next else None

    async def update(self, step: int) -> None:
        """One step of the inner optimiser, when every stage has its part of the gradient."""
        self._updates = step
        try:
            if step < self._entered_at:  # what the round came to has been heard: do what the row did without us
                norm = self._place.norms[self._grid.replica(self._peer.id)]
                await self._peer.work("compute", 0.0, lambda: self._stage.update(step, norm))
            await self._update(step)
        finally:
            self._updates = None

    async def _update(self, step: int) -> None:
        while self._next == step:
            try:
                norms = await self._norms_of_all(step)
            except Lost:
                reduced = self._stage.grads.clone()  # it may have been averaged over replicas
                await self._reunite()
                if self._next == step:
                    await self._pass(step)
                    self._stage.grads.copy_(reduced)
                continue
            await self._step(step, norms)

    async def evaluate(self) -> dict[str, float] | None:
        """Return the held-out metrics of the whole model at the first stage, None at others, which send their part.

        None at the first stage too once the party has lost somebody: others may know and wait for us, with the step
        before still to be done.
        """
        tag = Tag(EVALUATION, self._peer.step, "params")
        if self.stage:
            self._peer.send(self._row[0], tag, EXACT.encode(self._stage.params))
            return None
        parts = [self._stage.params]
        for worker in self._row[1:]:
            try:
                packet = await self._packet(worker, tag)
            except PeerGone:
                return None
            parts.append(self._decoded(worker, packet, EXACT, self._stage.cut.layouts[len(parts)].size))
        return await self._peer.work("evaluate", 0.0, lambda: self._stage.evaluate_whole(parts))

    @property
    def _next(self) -> int:
        assert self._place.next is not None  # a newcomer has entered before it trains
        return self._place.next

    async def _pass(self, step: int) -> float | None:
        """Go forward and back through all hops of ours, until that succeeds."""
        while True:
            self._stage.begin()
            self._tell_state(step)
            draw = self._ways.draws(step)
            if draw != self._drawn:
                self._drawn, self._timetable = draw, timetable(self._ways, self._ground, draw, self._order)
            paths, actions = self._timetable
            try:
                for kind, number, place in actions.get(self._peer.id, ()):
                    await (self._forward if kind == "forward" else self._go_back)(step, paths[number], place)
                return self._stage.mean_loss(step)
            except Lost:
                await self._reunite()

    async def _forward(self, step: int, path: Path, place: int) -> None:
        received, hop = None, path.hops[place]
        if place:
            received = await self._values(
                path.hops[place - 1].worker, self._way(step, "forward", path, place), hop.start
            )
        steps = FORWARD_SHARE * self._share(hop)
        out = await self._peer.work("compute", steps, lambda: self._stage.forward(step, path, place, received))
        if out is not None:
            await self._hand_over(path.hops[place + 1].worker, self._way(step, "forward", path, place + 1), out)

    async def _go_back(self, step: int, path: Path, place: int) -> None:
        received, hop = None, path.hops[place]
        if place + 1 < len(path.hops):
            received = await self._values(
                path.hops[place + 1].worker, self._way(step, "backward", path, place), hop.stop
            )
        steps = (1 - FORWARD_SHARE) * self._share(hop)
        gradient = await self._peer.work("compute", steps, lambda: self._stage.go_back(path, place, received))
        if gradient is not None:
            await self._hand_over(path.hops[place - 1].worker, self._way(step, "backward", path, place - 1), gradient)

    def _share(self, hop: Hop) -> float:
        return self._stage.cut.share(hop.blocks) / self._stage.microbatches

    async def _norms_of_all(self, step: int) -> dict[int, float]:
        """Return the norms of the replicas' whole gradients, when everybody has its part."""
        squares, first = self._stage.squared_norm(), self._party[0]
        await self._tell_gradient(step)
        if self._peer.id != first:
            self._peer.send(first, self._tag(step, "squares"), _said([squares]))
            await self._hear_gradients(step, self._reunion.losses)
            return dict(zip(self._replicas, await self._numbers(first, self._tag(step, "norms")), strict=True))
        told = {first: squares}
        for worker in self._party[1:]:
            (told[worker],) = await self._numbers(worker, self._tag(step, "squares"), 1)
        await self._hear_gradients(step, self._reunion.losses)
        norms = [
            math.sqrt(sum(told[self._grid.worker(replica, stage)] for stage in range(self._grid.stages)))
            for replica in self._replicas
        ]
        for worker in self._party[1:]:
            self._peer.send(worker, self._tag(step, "norms"), _said(norms))
        return dict(zip(self._replicas, norms, strict=True))

    def _tell_state(self, step: int) -> None:
        """Begin to send what is followed of us, if its keeper cannot know it: when a round, or a loss, was before."""
        if self._tells_state or step < self._peer.step:
            for follows in self._followed:
                spans = self._stage.cut.spans(follows.stage, follows.blocks)
                slots = self._peer.slots if self._keeps_all else {}
                for number, packet in enumerate(packed(self._stage, spans, slots)):
                    arrived = self._peer.send(self._row[follows.keeper], self._tag(step, f"state {number}"), packet)
                    self._telling.append(arrived)
        self._tells_state = False

    async def _tell_gradient(self, step: int) -> None:
        """Have all that is followed of us where its copy is, before anybody can have done the step."""
        for follows in self._followed:
            gradient = gather(self._stage.grads, self._stage.cut.spans(follows.stage, follows.blocks))
            word = EXACT.encode(gradient) if step >= self._peer.step else signal("")  # it has done that step already
            self._telling.append(self._peer.send(self._row[follows.keeper], self._tag(step, "followed"), word))
        for arrived in self._telling:
            with suppress(PeerGone):  # then the party has lost it, as we shall hear
                await arrived
        self._telling.clear()

    async def _hear_gradients(self, step: int, losses: int) -> None:
        """Take up what we are told of a step of what we follow, as it was when the party had `losses` losses."""
        if self._heard == (step, losses):
            return
        for follower in self._followers:
            owner = self._row[follower.follows.stage]
            packet = await self._packet(owner, Tag(CHANNEL, step, f"followed {losses}"))
            gradient = None if packet.codec == SIGNAL else self._decoded(owner, packet, EXACT, follower.numel)
            await self._hear_states(step, losses)  # sent before, and here by now if it was
            follower.hear(gradient)
        self._heard = step, losses

    async def _hear_states(self, step: int, losses: int) -> None:
        """Take up what has come of the state of what we follow; nothing is waited for."""
        for follower in self._followers:
            owner = self._row[follower.follows.stage]

            async def here(number: int, owner: int = owner) -> Packet:
                return (await self._peer.recv(owner, Tag(CHANNEL, step, f"state {number} {losses}"), 0.0))[1]

            try:
                follower.take(await unpacked(follower.follows, here, self._stage))
            except (PeerGone, TimeoutError):
                continue
            except FrameError as error:
                raise self._reunion.refused(owner, error) from None

    async def _step(self, step: int, norms: Mapping[int, float]) -> None:
        """Step, unless it is a step that only the others of the party have to do."""
        applied, norm = self._place.applied, norms[self._grid.replica(self._peer.id)]
        if step >= self._peer.step:
            clip, own = self._peer.inner.clip_norm, math.sqrt(self._stage.squared_norm())
            applied = own if clip is None or norm <= clip else own * clip / norm
            await self._peer.work("compute", 0.0, lambda: self._stage.update(step, norm))
        for follower in self._followers:
            follower.step(step, norm)
        self._place = Place(next=step + 1, norms=dict(norms), applied=applied)
        self._peer.close(CHANNEL, step)

    async def _reunite(self) -> None:
        """Come together again after a loss."""
        losses = self._reunion.losses

        async def catch_up(latest: Place) -> None:
            """Do a step whose norms others have been told: what we need of it had come before that."""
            await self._hear_gradients(self._next, losses)
            await self._step(self._next, latest.norms)

        if self._place.next is not None:
            await self._hear_states(self._next, losses)  # whoever is lost may need it
        self._telling.clear()
        latest = await self._reunion.meet(lambda: self._place, catch_up)
        self._tells_state = True
        self._place = self._place.model_copy(update={"next": latest.next, "norms": latest.norms, "holds": True})

    async def _hand_over(self, to: int, tag: Tag, values: Tensor) -> None:
        self._peer.send(to, tag, await self._peer.aside(values.numel(), lambda: self._codec.encode(values)))

    async def _values(self, source: int, tag: Tag, seam: int) -> Tensor:
        """Return what somebody hands over at the seam before block `seam`."""
        packet, numel = await self._packet(source, tag), math.prod(self._stage.cut.shape(seam))
        return await self._peer.aside(numel, lambda: self._decoded(source, packet, self._codec, numel))

    def _decoded(self, source: int, packet: Packet, codec: Codec, numel: int) -> Tensor:
        try:
            if packet.numel != numel:
                raise FrameError("length", f"{packet.numel} elements where there are {numel}")
            return codec.decode(packet, self._stage.vector(numel))
        except FrameError as error:
            raise self._reunion.refused(source, error) from None

    async def _numbers(self, source: int, tag: Tag, count: int | None = None) -> list[float]:
        packet = await self._packet(source, tag)
        try:
            numbers = [float(number) for number in signal_text(packet).split()]
        except FrameError as error:
            raise self._reunion.refused(source, error) from None
        except ValueError:
            raise self._reunion.refused(source, FrameError("codec", f"{tag} is no number")) from None
        if len(numbers) != (len(self._replicas) if count is None else count):
            raise self._reunion.refused(source, FrameError("length", f"{tag} has {len(numbers)} numbers"))
        return numbers

    async def _packet(self, source: int, tag: Tag) -> Packet:
        return await self._reunion.recv(source, tag)

    def _way(self, step: int, kind: str, path: Path, place: int) -> Tag:
        return self._tag(step, f"{kind} {path.replica} {path.microbatch} {place}")

    def _tag(self, step: int, part: str) -> Tag:
        """Name a message of a local step. What was sent before the party lost somebody is not what is sent after."""
        return Tag(CHANNEL, step, f"{part} {self._reunion.losses}")


def _said(numbers: Sequence[float]) -> Packet:
    """Return a packet that carries the numbers exactly, in as many bytes as any others: times do not depend on them."""
    return signal(" ".join(f"{number:.17e}" for number in numbers))
