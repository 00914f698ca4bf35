"""Codecs that scale blocks of elements: int8."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from decentral.protocols.codecs.codec import Codec


class Int8(Codec):
    """Blockwise linear 8-bit: q = round(127 x / max|x|) in each block, ties to even.

    One float32 scale a block, then one byte an element: 8 + 32 / block bits each. The error is at most max|x| / 254 of
    the block; its largest element is exact, and a block of zeros decodes to zeros.
    """

    name = "int8"
    block: int = Field(default=256, ge=1)
    """Elements that share a scale."""

    @property
    def grain(self) -> int:
        return self.block

    def wire_bytes(self, numel: int) -> int:
        return 4 * self._blocks(numel) + numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        blocks = self._padded(values)
        scales, quantised = self._parts(payload, values.numel())
        torch.amax(blocks.abs(), dim=1, out=scales)
        divisors = torch.where(scales > 0, scales, 1.0)  # dividing first: 127 / scale overflows for the tiniest blocks
        rounded = (blocks / divisors[:, None]).mul_(127.0).round_().view(-1)[: values.numel()]
        quantised.copy_(rounded)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        scales, quantised = self._parts(payload, values.numel())
        blocks = self._padded(quantised.to(torch.float32)).div_(127.0).mul_(scales[:, None])
        values.copy_(blocks.view(-1)[: values.numel()])

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def _padded(self, values: Tensor) -> Tensor:
        """Return the values as `[blocks, block]`, the last block filled up with zeros."""
        blocks = self._blocks(values.numel())
        missing = blocks * self.block - values.numel()
        return (functional.pad(values, (0, missing)) if missing else values).view(blocks, self.block)

    def _parts(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        scales_end = 4 * self._blocks(numel)
        return payload[:scales_end].view(torch.float32), payload[scales_end:].view(torch.int8)
