"""`Line`: one worker's place in a pipeline, between the stage before and the stage behind."""

from __future__ import annotations

import math

from torch import Tensor

from decentral.errors import PeerGone
from decentral.grid import Grid
from decentral.peer import Peer
from decentral.pipeline.orders import ORDERS
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.stage import Stage
from decentral.protocols.codecs import Codec, Float32
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

EXACT = Float32()
CHANNEL = "pipeline"
EVALUATION = "evaluation"
FORWARD_SHARE = 1 / 3
"""Share of a local step's time that the forward pass takes; the backward pass computes two products for each."""
PATIENCES = 20
"""What comes from another stage may take so many times a worker's patience: that stage may be in a long round."""


class Line:
    """Takes a worker's stage through its replica's batches, together with the workers of the other stages.

    A local step is done by all stages or by none: each says when its gradient is whole, and what its squares add up to;
    the first stage, which is always the last to be through, answers with the norm of the whole gradient, and then all
    step. Everything raises `PeerGone` when another stage is gone, and `TaskError` when the task raises.
    """

    def __init__(self, peer: Peer, stage: Stage, settings: Pipeline) -> None:
        grid, last = Grid(settings.stages), settings.stages - 1
        self._peer, self._stage, self._codec = peer, stage, settings.codec
        self._row = grid.row(peer.id)
        self.stage = grid.stage(peer.id)
        self._before = self._row[self.stage - 1] if self.stage else None
        self._behind = self._row[self.stage + 1] if self.stage < last else None
        self._actions = ORDERS[settings.order](self.stage, settings.stages, settings.microbatches)
        self._share = stage.cut.share(self.stage) / settings.microbatches
        self._evaluations = 0

    async def train(self, step: int, steps: int) -> float | None:
        """Do local steps `step .. step + steps - 1`; return their mean loss at the last stage, None at others."""
        losses = []
        for at in range(step, step + steps):
            losses.append(await self.gradient(at))
            await self.update(at)
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None

    async def gradient(self, step: int) -> float | None:
        """Fill `grads` with the stage's part of local step `step`'s gradient; return as `train`."""
        self._stage.begin()
        for kind, microbatch in self._actions:
            if kind == "forward":
                await self._forward(step, microbatch)
            else:
                await self._go_back(step, microbatch)
        return self._stage.mean_loss(step)

    async def update(self, step: int) -> None:
        """One step of the inner optimiser, when every stage has its part of the gradient."""
        squares, first = self._stage.squared_norm(), self._row[0]
        if self._peer.id == first:
            told = [squares] + [await self._number(worker, Tag(CHANNEL, step, "squares")) for worker in self._row[1:]]
            norm = sum(told) ** 0.5
            for worker in self._row[1:]:
                self._peer.send(worker, Tag(CHANNEL, step, "norm"), _said(norm))
        else:
            self._peer.send(first, Tag(CHANNEL, step, "squares"), _said(squares))
            norm = await self._number(first, Tag(CHANNEL, step, "norm"))
        await self._peer.work("compute", 0.0, lambda: self._stage.update_with(step, norm))
        self._peer.close(CHANNEL, step)

    async def evaluate(self) -> dict[str, float] | None:
        """Return the held-out metrics of the whole model at the first stage, None at others, which send their part."""
        self._evaluations += 1
        tag = Tag(EVALUATION, self._evaluations, "params")
        if self.stage:
            self._peer.send(self._row[0], tag, EXACT.encode(self._stage.params))
            return None
        parts = [self._stage.params]
        for worker in self._row[1:]:
            packet = await self._packet(worker, tag)
            parts.append(self._decoded(worker, packet, EXACT, packet.numel))
        return await self._peer.work("evaluate", 0.0, lambda: self._stage.evaluate_whole(parts))

    async def _forward(self, step: int, microbatch: int) -> None:
        received, name = None, f"forward {microbatch}"
        if self._before is not None:
            received = await self._values(self._before, Tag(CHANNEL, step, name), self.stage - 1)
        steps = FORWARD_SHARE * self._share
        out = await self._peer.work("compute", steps, lambda: self._stage.forward(step, microbatch, received))
        if self._behind is not None and out is not None:
            await self._hand_over(self._behind, Tag(CHANNEL, step, name), out)

    async def _go_back(self, step: int, microbatch: int) -> None:
        received, name = None, f"backward {microbatch}"
        if self._behind is not None:
            received = await self._values(self._behind, Tag(CHANNEL, step, name), self.stage)
        steps = (1 - FORWARD_SHARE) * self._share
        gradient = await self._peer.work("compute", steps, lambda: self._stage.go_back(microbatch, received))
        if self._before is not None and gradient is not None:
            await self._hand_over(self._before, Tag(CHANNEL, step, name), gradient)

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
            raise self._refused(source, error) from None

    async def _number(self, source: int, tag: Tag) -> float:
        packet = await self._packet(source, tag)
        try:
            return float(signal_text(packet))
        except FrameError as error:
            raise self._refused(source, error) from None
        except ValueError:
            raise self._refused(source, FrameError("codec", f"{tag} is no number")) from None

    async def _packet(self, source: int, tag: Tag) -> Packet:
        try:
            return (await self._peer.recv(source, tag, PATIENCES * self._peer.patience_s))[1]
        except PeerGone:
            raise PeerGone(f"its replica has lost {self._name(source)}") from None
        except TimeoutError:
            raise PeerGone(f"of its replica, {self._name(source)} does not answer") from None

    def _refused(self, source: int, error: FrameError) -> PeerGone:
        self._peer.refuse(source, error)
        return PeerGone(f"of its replica, {self._name(source)} sent what cannot be read: {error}")

    def _name(self, worker: int) -> str:
        return f"stage {self._row.index(worker)}, worker {worker}"


def _said(number: float) -> Packet:
    """Return a packet that carries the number exactly, in as many bytes as any other: times do not depend on it."""
    return signal(f"{number:.17e}")
