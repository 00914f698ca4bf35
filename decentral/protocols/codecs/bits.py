"""Numbers of a few bits each, packed without gaps: the first number in the lowest bits of the first byte."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from decentral.wire import FrameError

MAX_WIDTH = 24
"""Bits that a number may have: with seven more for its place in a byte it fits into int32."""


def packed_bytes(count: int, width: int) -> int:
    """Return the bytes that `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack_bits(numbers: Tensor, width: int, payload: Tensor) -> None:
    """Write `numbers` `[n]`, each in 0 .. 2^width - 1, into `payload` `[packed_bytes(n, width)]` uint8."""
    per_group, group_bytes, dtype = _groups(width)
    groups = functional.pad(numbers.to(dtype), (0, -numbers.numel() % per_group)).view(-1, per_group)
    packed = torch.zeros(len(groups), group_bytes, dtype=dtype, device=numbers.device)
    for place in range(per_group):
        first, shift = divmod(place * width, 8)
        shifted = groups[:, place] << shift
        for byte in range(first, first + packed_bytes(1, shift + width)):
            packed[:, byte] |= shifted & 255
            shifted = shifted >> 8
    payload.copy_(packed.view(-1)[: payload.numel()])


def unpack_bits(payload: Tensor, width: int, count: int) -> Tensor:
    """Return the `count` numbers of `width` bits in `payload`, uint8 or int32; raises `FrameError` for bits beyond."""
    spare = -count * width % 8
    if spare and int(payload[-1]) >> (8 - spare):
        raise FrameError("codec", f"{spare} spare bits after {count} numbers of {width} bits are not all zero")
    per_group, group_bytes, dtype = _groups(width)
    packed = functional.pad(payload, (0, -payload.numel() % group_bytes)).view(-1, group_bytes)
    numbers = torch.empty(len(packed), per_group, dtype=dtype, device=payload.device)
    for place in range(per_group):
        first, shift = divmod(place * width, 8)
        whole = packed[:, first].to(dtype)
        for byte in range(1, packed_bytes(1, shift + width)):
            whole = whole | packed[:, first + byte].to(dtype) << 8 * byte
        torch.bitwise_and(whole >> shift, (1 << width) - 1, out=numbers[:, place])
    return numbers.view(-1)[:count]


def _groups(width: int) -> tuple[int, int, torch.dtype]:
    """Return how many numbers fill how many bytes exactly, and a dtype that holds a number shifted by up to 7 bits."""
    common = gcd(8, width)
    return 8 // common, width // common, torch.uint8 if 8 % width == 0 else torch.int32
