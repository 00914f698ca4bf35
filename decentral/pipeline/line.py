"""`Line`: one worker's place in a pipeline, between the stage before and the stage behind."""

from __future__ import annotations

import math

from torch import Tensor

from decentral.errors import PeerGone
from decentral.grid import Grid
from decentral.peer import Peer
from decentral.pipeline.orders import ORDERS
from decentral.pipeline.reunion import Lost, Place, Reunion
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.stage import Stage
from decentral.protocols.codecs import Codec, Float32
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

EXACT = Float32()
CHANNEL = "pipeline"
EVALUATION = "evaluation"
FORWARD_SHARE = 1 / 3
"""Share of a local step's time that the forward pass takes; the backward pass computes two products for each."""


class Line:
    """Takes a worker's stage through its replica's batches, together with the workers of the other stages: its row.

    A local step is done by all stages or by none: each says when its gradient is whole, and what its squares add up to;
    the first stage, which is always the last to be through, answers with the norm of the whole gradient, and then all
    step. When a worker of the row is lost the others wait for it to come again, and do the step that was under way anew
    (see `Reunion`). All raise `PeerGone` when that fails or is not wanted, and `TaskError` when the task raises.
    """

    def __init__(self, peer: Peer, stage: Stage, settings: Pipeline, *, recovers: bool = False) -> None:
        grid, last = Grid(settings.stages), settings.stages - 1
        self._peer, self._stage, self._codec = peer, stage, settings.codec
        self._row = grid.row(peer.id)
        self.stage = grid.stage(peer.id)
        self._before = self._row[self.stage - 1] if self.stage else None
        self._behind = self._row[self.stage + 1] if self.stage < last else None
        self._actions = ORDERS[settings.order](self.stage, settings.stages, settings.microbatches)
        self._share = stage.cut.share(self.stage) / settings.microbatches
        self._firsts = grid.column(0, len(peer.cohort) * settings.stages)
        self._place = Place(next=0)
        self._is_updating = False
        self._reunion = Reunion(peer, stage, self._row, settings.recovery if recovers else None)

    @property
    def evaluates(self) -> bool:
        """Whether this is the row that evaluates: that of the lowest member who holds the first stage."""
        firsts = self._peer.everybody.party("", self._firsts)
        return self._row[0] == min(firsts, default=self._row[0])

    @property
    def waits(self) -> bool:
        """Whether the worker does nothing but wait for others of its row, in the midst of a local phase.

        Between the round on a gradient and its update it does not count: what it holds then is no state to begin with.
        """
        return self._reunion.waits and not self._is_updating

    async def enter(self, holds: bool) -> None:
        """Find a newcomer's place in a row that may be in the midst of a step.

        It `holds` its stage as somebody gave it who has the same one; otherwise its row rebuilds it.
        """
        self._place = Place(next=None, holds=holds)
        await self._reunite()

    async def catch_up(self, step: int) -> None:
        """Go through the steps before `step`, if a worker that has come back is ahead of its row.

        That is for the others' sake, and without an update: whoever has let it in has done these already.
        """
        await self.train(step, 0)

    async def train(self, step: int, steps: int) -> float | None:
        """Do local steps `step .. step + steps - 1`, less those that the row of a worker that has come back has done.

        Return their mean loss at the last stage, None at others.
        """
        losses = []
        while self._next < step + steps:
            at = self._next
            losses.append(await self._pass(at))
            await self._update(at)
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None

    async def gradient(self, step: int) -> float | None:
        """Fill `grads` with the stage's part of local step `step`'s gradient; return as `train`."""
        return await self._pass(step)

    async def update(self, step: int) -> None:
        """One step of the inner optimiser, when every stage has its part of the gradient."""
        self._is_updating = True
        try:
            await self._update(step)
        finally:
            self._is_updating = False

    async def _update(self, step: int) -> None:
        while self._next == step:
            try:
                norm = await self._norm_of_all(step)
            except Lost:
                reduced = self._stage.grads.clone()  # it may have been averaged over replicas
                await self._reunite()
                if self._next == step:
                    await self._pass(step)
                    self._stage.grads.copy_(reduced)
                continue
            await self._step(step, norm)

    async def evaluate(self) -> dict[str, float] | None:
        """Return the held-out metrics of the whole model at the first stage, None at others, which send their part.

        None at the first stage too if one of the others is gone.
        """
        tag = Tag(EVALUATION, self._peer.step, "params")
        if self.stage:
            self._peer.send(self._row[0], tag, EXACT.encode(self._stage.params))
            return None
        parts = [self._stage.params]
        for worker in self._row[1:]:
            try:
                _, packet = await self._peer.recv(worker, tag)
            except (PeerGone, TimeoutError):
                return None
            parts.append(self._decoded(worker, packet, EXACT, self._stage.cut.layouts[len(parts)].size))
        return await self._peer.work("evaluate", 0.0, lambda: self._stage.evaluate_whole(parts))

    @property
    def _next(self) -> int:
        assert self._place.next is not None  # a newcomer has entered before it trains
        return self._place.next

    async def _pass(self, step: int) -> float | None:
        """Go forward and back through all microbatches, until that succeeds."""
        while True:
            self._stage.begin()
            try:
                for kind, microbatch in self._actions:
                    await (self._forward if kind == "forward" else self._go_back)(step, microbatch)
                return self._stage.mean_loss(step)
            except Lost:
                await self._reunite()

    async def _forward(self, step: int, microbatch: int) -> None:
        received, tag = None, self._tag(step, f"forward {microbatch}")
        if self._before is not None:
            received = await self._values(self._before, tag, self.stage - 1)
        steps = FORWARD_SHARE * self._share
        out = await self._peer.work("compute", steps, lambda: self._stage.forward(step, microbatch, received))
        if self._behind is not None and out is not None:
            await self._hand_over(self._behind, tag, out)

    async def _go_back(self, step: int, microbatch: int) -> None:
        received, tag = None, self._tag(step, f"backward {microbatch}")
        if self._behind is not None:
            received = await self._values(self._behind, tag, self.stage)
        steps = (1 - FORWARD_SHARE) * self._share
        gradient = await self._peer.work("compute", steps, lambda: self._stage.go_back(microbatch, received))
        if self._before is not None and gradient is not None:
            await self._hand_over(self._before, tag, gradient)

    async def _norm_of_all(self, step: int) -> float:
        """Return the norm of the whole gradient, when every stage has its part."""
        squares, first = self._stage.squared_norm(), self._row[0]
        if self._peer.id != first:
            self._peer.send(first, self._tag(step, "squares"), _said(squares))
            return await self._number(first, self._tag(step, "norm"))
        told = [squares] + [await self._number(worker, self._tag(step, "squares")) for worker in self._row[1:]]
        norm = math.sqrt(sum(told))
        for worker in self._row[1:]:
            self._peer.send(worker, self._tag(step, "norm"), _said(norm))
        return norm

    async def _step(self, step: int, norm: float) -> None:
        """Step, unless it is a step that only the others of the row have to do."""
        applied = self._place.applied
        if step >= self._peer.step:
            clip, own = self._peer.inner.clip_norm, math.sqrt(self._stage.squared_norm())
            applied = own if clip is None or norm <= clip else own * clip / norm
            await self._peer.work("compute", 0.0, lambda: self._stage.update_with(step, norm))
        self._place = Place(next=step + 1, norm=norm, applied=applied)
        self._peer.close(CHANNEL, step)

    async def _reunite(self) -> None:
        """Come together again after a loss, and do the step that others have done already."""
        place, norm = await self._reunion.meet(self._place)
        if self._place.next is not None and self._place.next < place:
            await self._step(self._place.next, norm)
        self._place = self._place.model_copy(update={"next": place, "holds": True})

    async def _hand_over(self, to: int, tag: Tag, values: Tensor) -> None:
        self._peer.send(to, tag, await self._peer.aside(values.numel(), lambda: self._codec.encode(values)))

    async def _values(self, source: int, tag: Tag, boundary: int) -> Tensor:
        """Return what a neighbour hands over at the boundary behind stage `boundary`."""
        packet, numel = await self._packet(source, tag), math.prod(self._stage.cut.shape(boundary))
        return await self._peer.aside(numel, lambda: self._decoded(source, packet, self._codec, numel))

    def _decoded(self, source: int, packet: Packet, codec: Codec, numel: int) -> Tensor:
        try:
            if packet.numel != numel:
                raise FrameError("length", f"{packet.numel} elements where there are {numel}")
            return codec.decode(packet, self._stage.vector(numel))
        except FrameError as error:
            raise self._reunion.refused(source, error) from None

    async def _number(self, source: int, tag: Tag) -> float:
        packet = await self._packet(source, tag)
        try:
            return float(signal_text(packet))
        except FrameError as error:
            raise self._reunion.refused(source, error) from None
        except ValueError:
            raise self._reunion.refused(source, FrameError("codec", f"{tag} is no number")) from None

    async def _packet(self, source: int, tag: Tag) -> Packet:
        return await self._reunion.recv(source, tag)

    def _tag(self, step: int, part: str) -> Tag:
        """Name a message of a local step. What was sent before the row lost somebody is not what is sent after."""
        return Tag(CHANNEL, step, f"{part} {self._reunion.losses}")


def _said(number: float) -> Packet:
    """Return a packet that carries the number exactly, in as many bytes as any other: times do not depend on it."""
    return signal(f"{number:.17e}")
