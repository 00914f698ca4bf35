"""Dynamic 8-bit: fine near the largest element of a block, and seven decades deep."""

from __future__ import annotations

from functools import lru_cache

import torch
from pydantic import Field
from torch import Tensor

from decentral.protocols.codecs.blockwise import Blockwise

DECADES = 7
ZERO = 127
"""The code of 0; code 127 + m stands for the m-th magnitude, 127 - m for its negative."""


class Dynamic8(Blockwise):
    """Blockwise 8-bit quantisation by the dynamic map: C(x) = s code[q], q = argmin_k |code[k] - x / s|, s = max|x|.

    The map has 0, 1 and, with both signs, the midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6), for i from 0
    to 6: 256 values. There is no -1: a block's largest element is exact if positive, and 0.7 % off if negative. The
    relative error is at most 6.2 % for |x| / s in [0.1, 1], 11 % in [0.01, 0.1], 18 % and 29 % in the next two decades:
    small elements beside a large one survive that int8 rounds to zero. Ties go away from zero. One float32 scale a
    block, then one byte an element: 8 + 32 / block bits each. Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", arXiv 2110.02861.
    """

    name = "dynamic8"
    block: int = Field(default=2048, ge=1)
    """Elements that share a scale."""

    def quantise(self, ratios: Tensor, codes: Tensor) -> None:
        bits = ratios.view(torch.int32)
        steps = _steps(ratios.device).index_select(0, (bits >> 16).bitwise_and_(0xFFFF))
        codes.copy_(bits.bitwise_and_(0xFFFF).add_(steps).bitwise_right_shift_(16).abs_())

    def dequantise(self, codes: Tensor, ratios: Tensor) -> None:
        torch.index_select(_codebook(codes.device), 0, codes.to(torch.int32), out=ratios)  # every byte is a code


def _magnitudes() -> list[float]:
    """Return the 129 magnitudes, ascending, as float64; quotients of integers, so the same on every machine."""
    parts = ((2 ** (i + 1), 10 ** (DECADES - i), j) for i in range(DECADES) for j in range(2**i))
    return [0.0, *((n + 9 * (2 * j + 1)) / (n * tens) for n, tens, j in parts), 1.0]


@lru_cache
def _codebook(device: torch.device) -> Tensor:
    """Return what the codes stand for, `[256]` float32, ascending."""
    magnitudes = _magnitudes()
    return torch.tensor([*(-m for m in reversed(magnitudes[1:-1])), *magnitudes], dtype=torch.float32, device=device)


@lru_cache
def _steps(device: torch.device) -> Tensor:
    """Return a table over the upper 16 bits of a float32 that gives the code of the float32 with one addition.

    Floats with the same upper half lie so close that at most one threshold between two magnitudes is among them. Let m
    be the magnitude's number for the first of them, and let the number grow where the lower half reaches t (2^16: it
    does not). The entry is 2^16 (127 + m) + 2^16 - t, so adding the lower half and dropping the last 16 bits gives the
    code. For negative numbers it is 2^16 (m - 127) + 2^16 - t, which gives minus the code.
    """
    magnitudes = _codebook(torch.device("cpu"))[ZERO:]
    middles = (magnitudes[1:].double() + magnitudes[:-1].double()) / 2  # exact
    thresholds = middles.to(torch.float32)
    thresholds = torch.where(
        thresholds.double() < middles, thresholds.view(torch.int32) + 1, thresholds.view(torch.int32)
    )
    tables = []
    for offset, bounds in ((ZERO, thresholds), (-ZERO, thresholds[:-1])):  # there is no -1
        firsts = torch.arange(1 << 15, dtype=torch.int32, device=bounds.device) << 16
        lower = torch.searchsorted(bounds, firsts, right=True)
        following = torch.cat((bounds, bounds.new_tensor([torch.iinfo(torch.int32).max])))[lower]
        tables.append(((lower + offset + 1) << 16) - (following - firsts).clamp(max=1 << 16))
    return torch.cat(tables).to(torch.int32).to(device)
