"""Codecs that keep every element: float32, bfloat16, float16."""

from __future__ import annotations

from math import isfinite

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

    def opened(self, payload: Tensor, numel: int, into: Tensor | None) -> Tensor:
        values = payload.view(torch.float32)
        return values if into is None else into.copy_(values)


class BFloat16(Codec):
    """Rounded to bfloat16, ties to even: 2 bytes each, relative error at most 2^-8 on normal numbers."""

    name = "bf16"

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        payload.view(torch.bfloat16).copy_(values)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(payload.view(torch.bfloat16))


class Float16(Codec):
    """Rounded to IEEE half precision, ties to even: 2 bytes each.

    The relative error is at most 2^-11 from 6.1e-5 upwards; below, the error is at most 2^-25, and less than that
    becomes 0. Beyond +-65504, the largest half, finite elements arrive as +-65504.
    """

    name = "f16"

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        if values.numel():
            low, high = (float(extreme) for extreme in torch.aminmax(values))
            largest = torch.finfo(torch.float16).max
            if max(-low, high) > largest and isfinite(low) and isfinite(high):  # what is not finite must stay so
                values = values.clamp(-largest, largest)
        payload.view(torch.float16).copy_(values)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(payload.view(torch.float16))
