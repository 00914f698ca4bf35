"""Error feedback: what a codec left out of one packet is added to the next."""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from decentral.protocols.codecs.codec import Codec, Wrapper
from decentral.protocols.codecs.coder import RESIDUAL, Coder, Reduce, SlotMaker
from decentral.wire import Packet


class ErrorFeedback(Wrapper):
    """Adds to each vector what the codec C inside left out of the vectors before it.

        a <- beta e + x;   send C(a);   e <- a - C(a)

    Seide et al., "1-bit SGD", Interspeech 2014; Karimireddy et al., arXiv 1901.09847. The residual e is float32, one
    for each worker and fragment. If a round is aborted e <- a: with beta = 1 what was sent and what is remembered add
    up to what was handed in, always.
    """

    name = "error_feedback"
    decay: float = Field(default=1.0, ge=0, le=1)
    """beta."""

    @field_validator("codec")
    @classmethod
    def _leaves_something_out(cls, codec: Codec) -> Codec:
        if codec.loss == "none":
            raise ValueError(f"codec '{codec.spelling()}' leaves nothing out that feedback could add")
        if codec.loss == "unbiased":
            raise ValueError(f"feedback around the unbiased codec '{codec.spelling()}' makes its errors grow")
        if type(codec).coder is not Codec.coder:
            raise ValueError(f"codec '{codec.spelling()}' remembers by itself what it left out")
        return codec

    def coder(self, slot: SlotMaker) -> Coder:
        return _FeedbackCoder(self, slot)


def all_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinity; true of a phantom."""
    return not isinstance(values, Tensor) or bool(torch.isfinite(values).all())


class _FeedbackCoder(Coder):
    def __init__(self, feedback: ErrorFeedback, slot: SlotMaker) -> None:
        super().__init__(feedback.codec)
        self._decay, self._slot = feedback.decay, slot
        self._offered: Tensor | None = None

    async def mean(self, values: Tensor, reduce: Reduce) -> Tensor:
        return await reduce(self._offer(values), self.codec)

    def encode(self, values: Tensor) -> Packet:
        return self.codec.encode(self._offer(values))

    def commit(self) -> None:
        offered = self._taken()
        if offered is not None:
            self._residual(offered).copy_(offered - self.codec.round_trip(offered))

    def abort(self) -> None:
        offered = self._taken()
        if offered is not None:
            self._residual(offered).copy_(offered)

    def undo(self) -> None:
        self._taken()

    def _offer(self, values: Tensor) -> Tensor:
        self._offered = torch.add(values, self._residual(values), alpha=self._decay)
        return self._offered

    def _taken(self) -> Tensor | None:
        """Return what was offered; None if it was not finite: nobody took it, and it would be remembered for ever."""
        offered, self._offered = self._offered, None
        assert offered is not None  # nothing was encoded
        return offered if all_finite(offered) else None

    def _residual(self, like: Tensor) -> Tensor:
        return self._slot(RESIDUAL, torch.zeros_like(like))
