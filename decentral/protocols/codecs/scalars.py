"""Codecs for single numbers, as zeroth-order rules send them."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.protocols.codecs.codec import Codec

STEPS_PER_E = 8
"""Steps in which a magnitude grows e-fold."""
FINEST = 63
"""Steps from 1 to the largest magnitude, and to the smallest."""
NOT_FINITE = 128
"""The code of a negative zero stands for what is not finite; the receiver refuses it."""


class OneByte(Codec):
    """A byte a number: the sign, and the logarithm of the magnitude in 7 bits, eight steps an e-fold.

        code = 64 + round(8 ln|x|), clamped to 1 .. 127;   C(x) = sign(x) exp((code - 64) / 8)

    Magnitudes from 3.8e-4 to 2.6e3 arrive within 6.5 %; larger ones as 2.6e3, smaller ones as 0 (code 0). After "Just
    One Byte (per gradient)", arXiv 2306.10015, whose reference code spends 255 levels besides the sign.
    """

    name = "one_byte"

    def wire_bytes(self, numel: int) -> int:
        return numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        steps = values.abs().log_().mul_(STEPS_PER_E).round_()
        codes = steps.clamp(max=FINEST).add_(FINEST + 1)
        codes = torch.where(steps < -FINEST, 0.0, codes)  # zeros too: their logarithm is minus infinity
        signs = torch.where((values < 0) & (codes > 0), 128.0, 0.0)
        payload.copy_(torch.where(torch.isfinite(values), codes + signs, float(NOT_FINITE)))

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        codes = torch.arange(256, device=payload.device)
        magnitudes = torch.exp(((codes & 127) - FINEST - 1).double() / STEPS_PER_E)
        table = torch.where(codes < 128, magnitudes, -magnitudes)
        table[0], table[NOT_FINITE] = 0.0, torch.nan
        values.copy_(table.to(torch.float32)[payload.long()])
