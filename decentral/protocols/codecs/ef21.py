"""EF21: workers send how their vector has changed, and everybody keeps what it has become."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from decentral.members import Members
from decentral.protocols.codecs.codec import Codec, Wrapper
from decentral.protocols.codecs.coder import Coder, Reduce, SlotMaker
from decentral.protocols.codecs.feedback import all_finite
from decentral.replica import seed_of


class EF21(Wrapper):
    """Sends by way of the codec C inside what the mirror g_i of the worker's vector x_i lacks.

        c_i = C(x_i - g_i);   g_i <- g_i + c_i;   G <- G + mean_i c_i;   the mean is G

    Richtárik et al., arXiv 2106.05203. G = mean_i g_i always, so with C(x) = x it is the mean of the x_i. For vectors
    that change little from round to round. The mirrors are those of certain workers: when others take part all
    begin again with zeros. If a round is aborted nothing changes, for nothing of x_i has been used up. Packets to one
    receiver have no mirror: they bring C(x_i).
    """

    name = "ef21"
    same_participants: ClassVar[bool] = True

    @field_validator("codec")
    @classmethod
    def _leaves_something_out(cls, codec: Codec) -> Codec:
        if codec.loss not in ("contractive", "rounding"):
            raise ValueError(
                f"ef21 needs a codec that brings a vector nearer with every round, such as 'topk'; "
                f"'{codec.spelling()}' is {'lossless' if codec.loss == 'none' else codec.loss}"
            )
        if type(codec).coder is not Codec.coder:
            raise ValueError(f"codec '{codec.spelling()}' has a memory of its own, and ef21 keeps one already")
        return codec

    def coder(self, slot: SlotMaker) -> Coder:
        return _MirrorCoder(self.codec, slot)


class _MirrorCoder(Coder):
    def __init__(self, codec: Codec, slot: SlotMaker) -> None:
        super().__init__(codec)
        self._slot = slot
        self._offer: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    async def mean(self, values: Tensor, reduce: Reduce) -> Tensor:
        if not isinstance(values, Tensor):  # a phantom: there is nothing to remember
            return await reduce(values, self.codec)
        mirror, mirrors = (self._slot(name, torch.zeros_like(values)) for name in ("mirror", "mirrors"))
        known, members = self._slot("members", torch.zeros(1, dtype=torch.int64)), _number(reduce.members)
        if not torch.equal(known, members):
            mirror, mirrors = torch.zeros_like(mirror), torch.zeros_like(mirrors)
        self._offer = None
        change = values - mirror
        mean = mirrors + await reduce(change, self.codec)
        self._offer = (mirror, change, mean, members)
        return mean

    def commit(self) -> None:
        if self._offer is not None and all_finite(self._offer[1]):
            mirror, change, mean, members = self._offer
            self._slot("mirror", mirror).copy_(mirror + self.codec.round_trip(change))
            self._slot("mirrors", mean).copy_(mean)
            self._slot("members", members).copy_(members)
        self._offer = None

    def abort(self) -> None:
        self._offer = None

    def undo(self) -> None:
        self._offer = None


def _number(members: Members) -> Tensor:
    """Return a number `[1]` int64 for these workers, whatever their epoch; never 0."""
    return torch.tensor([seed_of("members", members.ids) | 1])
