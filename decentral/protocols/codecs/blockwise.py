"""Codecs that scale blocks of elements; int8 and int4, which are linear."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from decentral.protocols.codecs.codec import Codec
from decentral.wire import FrameError

RUN = 1 << 18
"""Elements that a CPU works on at a time: with their scratch they stay in its cache."""


class Run(NamedTuple):
    """Consecutive elements, a whole number of blocks of `width` each, and where their scales and codes are."""

    elements: slice
    scales: slice
    codes: slice
    width: int


class Blockwise(Codec):
    """A scale s for each block and a code for each element: x arrives as s times the codebook's entry for x / s.

    s = max|x| / peak, where peak is the largest entry of the codebook. The payload is the float32 scales of all blocks,
    then the codes, `bits` each; whatever has more than one byte is little-endian. The last block may be shorter. A
    block of zeros has scale 0 and decodes to zeros.
    """

    bits: ClassVar[int] = 8
    """Bits of a code: 8, or 4 for two codes a byte, the first in the low half. Then blocks have an even length."""
    peak: ClassVar[float] = 1.0
    """The codebook's largest entry."""

    block: int = Field(ge=1)
    """Elements that share a scale."""

    @abstractmethod
    def quantise(self, ratios: Tensor, codes: Tensor) -> None:
        """Write the codes of `ratios` `[n]` float32, x / s, into `codes` uint8; `ratios` may be overwritten."""

    @abstractmethod
    def dequantise(self, codes: Tensor, ratios: Tensor) -> None:
        """Write the codebook's entries for `codes` uint8 into `ratios` `[n]` float32.

        Raises `FrameError` for codes that `quantise` never writes.
        """

    @property
    def grain(self) -> int:
        return self.block

    def wire_bytes(self, numel: int) -> int:
        return 4 * self._blocks(numel) + -(-numel * self.bits // 8)

    def pack(self, values: Tensor, payload: Tensor) -> None:
        scales, codes = self._parts(payload, values.numel())
        for run in self._runs(values):
            blocks, divisors = values[run.elements].view(-1, run.width), scales[run.scales]
            ratios = blocks.abs()
            torch.amax(ratios, dim=1, out=divisors).div_(self.peak)
            divisors = torch.where(divisors > 0, divisors, 1.0)
            torch.div(blocks, divisors[:, None], out=ratios)  # peak / max|x| would overflow for the tiniest blocks
            self.quantise(ratios.view(-1), codes[run.codes])

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        scales, codes = self._parts(payload, values.numel())
        low, high = (float(extreme) for extreme in torch.aminmax(scales))  # NaN is contagious
        if not 0 <= low <= high < float("inf"):
            raise FrameError("scale", f"a scale in a packet of codec '{self.spelling()}' is negative, NaN or infinity")
        for run in self._runs(values):
            self.dequantise(codes[run.codes], values[run.elements])
            values[run.elements].view(-1, run.width).mul_(scales[run.scales, None])

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def _parts(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        scales_end = 4 * self._blocks(numel)
        return payload[:scales_end].view(torch.float32), payload[scales_end:]

    def _runs(self, values: Tensor) -> Iterator[Run]:
        """Cut the vector into runs of whole blocks; a shorter last block is a run by itself."""
        numel = values.numel()
        whole = numel - numel % self.block
        length = max(RUN // self.block, 1) * self.block if values.device.type == "cpu" else max(whole, 1)
        for start in (*range(0, whole, length), *range(whole, numel, self.block)):
            stop = min(start + length, whole) if start < whole else numel
            yield Run(
                elements=slice(start, stop),
                scales=slice(start // self.block, self._blocks(stop)),
                codes=slice(start * self.bits // 8, -(-stop * self.bits // 8)),
                width=min(self.block, stop - start),
            )


class Int8(Blockwise):
    """Blockwise linear 8-bit: q = round(127 x / max|x|) in each block, ties to even.

    One float32 scale a block, then one byte an element: 8 + 32 / block bits each. The error is at most max|x| / 254 of
    the block; its largest element is exact, and a block of zeros decodes to zeros.
    """

    name = "int8"
    block: int = Field(default=256, ge=1)
    """Elements that share a scale."""

    def quantise(self, ratios: Tensor, codes: Tensor) -> None:
        codes.view(torch.int8).copy_(ratios.mul_(127.0).round_())

    def dequantise(self, codes: Tensor, ratios: Tensor) -> None:
        signed = codes.view(torch.int8)
        refuse_lowest(signed, self)
        ratios.copy_(signed).div_(127.0)


class Int4(Blockwise):
    """Blockwise linear 4-bit: q = round(7 x / max|x|) in each block, ties to even; two's complement.

    One float32 scale a block, then half a byte an element: 4 + 32 / block bits each. The error is at most max|x| / 14
    of the block; its largest element is exact, and a block of zeros decodes to zeros.
    """

    name = "int4"
    bits = 4
    block: int = Field(default=128, ge=2, multiple_of=2)
    """Elements that share a scale."""

    def quantise(self, ratios: Tensor, codes: Tensor) -> None:
        pack_nibbles(ratios.mul_(7.0).round_().to(torch.int8), codes)

    def dequantise(self, codes: Tensor, ratios: Tensor) -> None:
        upper = unpack_nibbles(codes, ratios.numel())
        refuse_lowest(upper, self)
        ratios.copy_(upper).div_(16 * 7.0)


def pack_nibbles(numbers: Tensor, codes: Tensor) -> None:
    """Write the low four bits of `numbers` `[n]` int8 into `codes` `[ceil(n / 2)]` uint8, the first in the low half."""
    pairs = functional.pad(numbers, (0, numbers.numel() % 2)).view(torch.int16).bitwise_and_(0x0F0F)
    codes.copy_((pairs >> 4).bitwise_or_(pairs))  # the low byte; the high one is cut off


def unpack_nibbles(codes: Tensor, numel: int) -> Tensor:
    """Return the `[numel]` nibbles of `codes` as int8, each in the upper half of its byte: 16 times what it says.

    Raises `FrameError` if the half byte that is left over after an odd number of them is not zero.
    """
    pairs = codes.to(torch.int16)
    pairs = (pairs << 8).bitwise_or_(pairs << 4).bitwise_and_(0xF0F0 - 0x10000)
    upper = pairs.view(torch.int8)
    if numel % 2 and int(upper[numel]):
        raise FrameError("codec", f"the spare half byte after {numel} codes of 4 bits is not zero")
    return upper[:numel]


def refuse_lowest(signed: Tensor, codec: Codec) -> None:
    """Raise `FrameError` if one of the `signed` int8 is -128, which no codec here writes: a thirtieth of unpacking."""
    if int(signed.amin()) == -128:
        raise FrameError("codec", f"a packet of codec '{codec.spelling()}' has a code that is never written")
