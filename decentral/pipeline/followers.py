"""`Follower`: a copy of another stage's blocks that takes the steps which they take there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from pydantic import BaseModel, NonNegativeInt, PositiveFloat, ValidationError
from torch import Tensor

from decentral.pipeline.recovery import Follows
from decentral.pipeline.stage import Copied, Stage, gather, state_of
from decentral.protocols.codecs import Float32
from decentral.replica import Replica, Spans
from decentral.wire import FrameError, Packet, signal, signal_text

EXACT = Float32()


class Standing(BaseModel):
    """Where an inner optimiser stands besides its running means: steps done, and its peak learning rate.

    `slots`: the names of what the sync rule keeps, with how many elements each has.
    """

    steps: NonNegativeInt
    lr: PositiveFloat
    slots: dict[str, NonNegativeInt] = {}


class Follower:
    """Keeps blocks of another stage, parameters and inner optimiser, and is sent the gradients of their steps.

    The same gradient, norm and optimiser make the same bits, so their state has to be sent only when somebody has come
    back, or when a round may have changed it.
    """

    def __init__(self, stage: Stage, follows: Follows) -> None:
        self.follows = follows
        self._replica: Replica = stage.replica_of(follows.stage, follows.blocks)
        self._gradient: Tensor | None = None
        self._slots: Mapping[str, Tensor] = {}

    @property
    def numel(self) -> int:
        return self._replica.layout.size

    def take(self, state: Copied) -> None:
        """Go on from that state."""
        for mine, told in zip(state_of(self._replica), state.vectors, strict=True):
            mine.copy_(told)
        self._replica.set_inner_steps(state.steps)
        self._replica.set_learning_rate(state.lr)
        self._slots = state.slots

    def hear(self, gradient: Tensor | None) -> None:
        """Have the gradient `[n]` of the step that is next; None if its stage does not step."""
        self._gradient = gradient

    def step(self, step: int, norm: float) -> None:
        """Take the step that was heard of, `norm` being that of the whole gradient."""
        if self._gradient is not None:
            self._replica.grads.copy_(self._gradient)
            self._replica.update(step, norm)
            self._gradient = None

    def state(self) -> list[Packet]:
        """Return what `unpacked` reads, for whoever has lost these blocks."""
        return packed(self._replica, ((0, self.numel),), self._slots)


def packed(replica: Replica, spans: Spans, slots: Mapping[str, Tensor]) -> list[Packet]:
    """Return how the optimiser stands, then what lies in these spans of parameters and running means, and the slots.

    One packet for each vector: the transport takes none that is longer than the longest vector.
    """
    vectors = [*(gather(values, spans) for values in state_of(replica)), *slots.values()]
    sizes = {name: values.numel() for name, values in slots.items()}
    standing = Standing(steps=replica.inner_steps, lr=replica.inner.lr, slots=sizes)
    return [signal(standing.model_dump_json()), *map(EXACT.encode, vectors)]


async def unpacked(follows: Follows, recv: Callable[[int], Awaitable[Packet]], stage: Stage) -> Copied:
    """Return what `packed` has told of the blocks, of which `recv` returns the k-th packet.

    Raises `FrameError` for anything else, and as `recv` does.
    """
    try:
        standing = Standing.model_validate_json(signal_text(await recv(0)))
    except ValidationError:
        raise FrameError("codec", "where an inner optimiser stands is not what it should be") from None
    numel, count = stage.cut.layout(follows.stage, follows.blocks).size, len(state_of(stage))
    vectors = []
    for number, size in enumerate([numel] * count + list(standing.slots.values()), 1):
        packet = await recv(number)
        if packet.numel != size:
            raise FrameError("length", f"{packet.numel} elements where there are {size}")
        vectors.append(EXACT.decode(packet, stage.vector(size)))
    slots = dict(zip(standing.slots, vectors[count:], strict=True))
    return Copied(follows.blocks, tuple(vectors[:count]), standing.steps, standing.lr, slots)
