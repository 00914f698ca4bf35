"""Codecs that keep every element: float32, bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.protocols.codecs.codec import Codec
from decentral.wire import Packet


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

    def lend(self, values: Tensor) -> Packet:
        if not isinstance(values, Tensor) or values.dtype != torch.float32 or not values.is_contiguous():
            return self.encode(values)
        payload = values.detach().view(-1).view(torch.uint8).cpu()
        return Packet(self.spelling(), values.numel(), payload.numel(), payload)

    def decode(self, packet: Packet, like: Tensor) -> Tensor:
        return self.read(packet, like).clone()

    def opened(self, payload: Tensor, numel: int) -> Tensor:
        return payload.view(torch.float32)


class BFloat16(Codec):
    """Rounded to bfloat16, ties to even: 2 bytes each, relative error at most 2^-9 on normal numbers."""

    name = "bf16"

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        payload.view(torch.bfloat16).copy_(values)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(payload.view(torch.bfloat16))
