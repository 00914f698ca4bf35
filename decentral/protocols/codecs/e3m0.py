"""E3M0: four bits an element, a sign and three bits of exponent."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from decentral.protocols.codecs.blockwise import Blockwise, pack_nibbles, refuse_lowest, unpack_nibbles
from decentral.wire import FrameError

BIAS = 3
"""Subtracted from the three bits: code e stands for 2^(e - 3)."""


class E3M0(Blockwise):
    """Blockwise floating-point numbers of 1 sign bit, 3 exponent bits and no mantissa.

        C(x) = s y,   y the nearest to x / s among 0, +-1/4, +-1/2, +-1, +-2, +-4, +-8, +-16,   s = max|x| / 16

    Nearest on the line, not in the logarithm: from 3/2 2^e upwards x / s becomes 2^(e + 1), from 1/8 upwards 1/4. So
    elements above max|x| / 128 are off by at most a third. Ties go away from zero. One float32 scale a block, then half
    a byte an element, sign first, then the exponent's bias in a byte of its own: 4 + 32 / block bits each. The largest
    element is exact if it is above 2^-122. Used for the outer gradients of Streaming DiLoCo, arXiv 2501.18512, which
    leaves bias, scale and rounding open; format names after arXiv 2405.13938.
    """

    name = "e3m0"
    bits = 4
    peak = 16.0
    block: int = Field(default=1024, ge=2, multiple_of=2)
    """Elements that share a scale."""

    def wire_bytes(self, numel: int) -> int:
        return super().wire_bytes(numel) + 1

    def pack(self, values: Tensor, payload: Tensor) -> None:
        super().pack(values, payload[:-1])
        payload[-1] = BIAS  # last, so that the scales stay aligned

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        if int(payload[-1]) != BIAS:
            raise FrameError("codec", f"codec '{self.spelling()}' has exponent bias {BIAS}, not {int(payload[-1])}")
        super().unpack(payload[:-1], values)

    def quantise(self, ratios: Tensor, codes: Tensor) -> None:
        signs = (ratios.view(torch.int32) >> 28).to(torch.int8)  # the sign is bit 3; the others do not matter
        bits = ratios.abs_().clamp_(min=2**-4).view(torch.int32)
        bits >>= 22  # half octaves: [2^k, 3/2 2^k) and [3/2 2^k, 2^(k + 1)) are consecutive numbers, 246 for k = -4
        halves = bits.to(torch.int8).add_(256 - 246)  # 0 .. 17, modulo 256; x / s < 24 even where s is subnormal
        nonzero = (halves >> 1).clamp_(max=1)  # from 1/8 upwards
        exponents = halves.sub_(1).bitwise_right_shift_(1)  # right but from 1/8 to 3/16, where 1 is missing
        torch.maximum(exponents, nonzero, out=exponents)
        pack_nibbles(exponents.bitwise_or_(nonzero.mul_(8).bitwise_and_(signs)), codes)

    def dequantise(self, codes: Tensor, ratios: Tensor) -> None:
        upper = unpack_nibbles(codes, ratios.numel())
        refuse_lowest(upper, self)  # minus zero
        bits = ratios.view(torch.int32).copy_(upper)
        bits.bitwise_left_shift_(19).bitwise_and_(0x83800000 - 0x100000000)  # sign and exponent where float32 has them
        ratios.mul_(2.0 ** (127 - BIAS))
