"""Codecs that keep every element: float32, bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.protocols.codecs.codec import Codec


class Float32(Codec):
    """The elements as they are: 4 bytes each, exact."""

    name = "float32"
    loss = "none"

    def wire_bytes(self, numel: int) -> int:
        return 4 * numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        payload.view(torch.float32).copy_(values)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(payload.view(torch.float32))


class BFloat16(Codec):
    """Rounded to bfloat16, ties to even: 2 bytes each, relative error at most 2^-9 on normal numbers."""

    name = "bf16"

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        payload.view(torch.bfloat16).copy_(values)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(payload.view(torch.bfloat16))
