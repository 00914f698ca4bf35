"""Sketches: random projections that are the same at every worker, and so can be summed before they are undone."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from decentral.phantom import Phantom
from decentral.protocols.codecs.bits import unpack_bits
from decentral.protocols.codecs.codec import Codec
from decentral.protocols.codecs.coder import Coder, Reduce, SlotMaker
from decentral.protocols.codecs.dense import Float32
from decentral.replica import seed_of

LARGEST_BLOCK = 1 << 16
"""Elements that are mixed with one another: of these a transform runs in the cache."""
SEED_BYTES = 8


class Sketch(Codec):
    """Projects blocks of d elements on b = d / ratio random directions: linear, unbiased, E ||C(x)||^2 = d/b ||x||^2.

        y = S H D x;   C(x) = D H S^T y / b

    D flips random signs, H is the d x d Hadamard matrix of ones and minus ones (fast Walsh-Hadamard transform), S
    chooses b rows without replacement: the subsampled randomised Hadamard transform of arXiv 2210.08371, block by
    block. The error is (d/b - 1) ||x||^2 on average, so learning rates have to shrink as bytes do; what is gained is
    that y is summed as it is. Means take directions of their own in every round; a packet to one receiver takes those
    that a checksum of the vector says, and brings their seed in its last 8 bytes. The last block is padded with zeros
    to a power of two.
    """

    name = "sketch"
    loss = "unbiased"
    linear = True
    ratio: float = Field(default=8.0, ge=1)
    """d / b."""

    @property
    def grain(self) -> int:
        return 0

    def coder(self, slot: SlotMaker) -> Coder:
        return _SketchCoder(self)

    def rows(self, numel: int) -> int:
        """Return how many directions a vector of `numel` elements is projected on."""
        return sum(blocks * self._rows(size) for blocks, size in _blocks(numel))

    def wire_bytes(self, numel: int) -> int:
        return 4 * self.rows(numel) + SEED_BYTES

    def pack(self, values: Tensor, payload: Tensor) -> None:
        seed = seed_of("sketch", int(values.view(torch.int32).sum()))
        payload[:-SEED_BYTES].view(torch.float32).copy_(self.project(values, seed))
        payload[-SEED_BYTES:] = torch.tensor(list(seed.to_bytes(SEED_BYTES, "little")), dtype=torch.uint8)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        seed = int.from_bytes(bytes(payload[-SEED_BYTES:].tolist()), "little")
        values.copy_(self.lift(payload[:-SEED_BYTES].view(torch.float32), values.numel(), seed))

    def project(self, values: Tensor, seed: int) -> Tensor:
        """Return y `[rows(n)]` of `values` `[n]`, exactly linear as long as float32 sums are exact."""
        random = _Random(seed, values.device)
        parts = [values[:0]]
        start = 0
        for blocks, size in _blocks(values.numel()):
            part = values[start : start + blocks * size]
            start += blocks * size
            signs = random.signs(part.numel())
            mixed = values.new_zeros(blocks, size)
            torch.mul(part, signs, out=mixed.view(-1)[: part.numel()])
            parts.append(_hadamard_(mixed)[:, random.rows(self._rows(size), size)].reshape(-1))
        return torch.cat(parts)

    def lift(self, sketch: Tensor, numel: int, seed: int) -> Tensor:
        """Return the `[numel]` vector that y stands for, the same bits everywhere: it takes additions alone."""
        random = _Random(seed, sketch.device)
        values = sketch.new_empty(numel)
        start = read = 0
        for blocks, size in _blocks(numel):
            part = values[start : start + blocks * size]
            start += blocks * size
            rows = self._rows(size)
            signs = random.signs(part.numel())
            mixed = sketch.new_zeros(blocks, size)
            mixed[:, random.rows(rows, size)] = sketch[read : read + blocks * rows].view(blocks, rows)
            read += blocks * rows
            torch.mul(_hadamard_(mixed.div_(rows)).view(-1)[: part.numel()], signs, out=part)
        return values

    def _rows(self, size: int) -> int:
        return max(1, round(size / self.ratio))


class _SketchCoder(Coder):
    def __init__(self, codec: Sketch) -> None:
        super().__init__(codec)
        self._sketch = codec

    async def mean(self, values: Tensor, reduce: Reduce) -> Tensor:
        if not isinstance(values, Tensor):  # a phantom: sizes alone
            await reduce(Phantom(self._sketch.rows(len(values))), Float32())
            return values
        mean = await reduce(self._sketch.project(values, reduce.seed), Float32())
        return self._sketch.lift(mean, values.numel(), reduce.seed)


class _Random:
    """What the seed decides, drawn on the CPU so that every device draws the same."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator, self._device = torch.Generator().manual_seed(seed), device

    def signs(self, count: int) -> Tensor:
        """Return `[count]` float32 of ones and minus ones."""
        drawn = torch.randint(0, 256, (-(-count // 8),), dtype=torch.uint8, generator=self._generator)
        return unpack_bits(drawn.to(self._device), 1, 8 * len(drawn))[:count].to(torch.float32).mul_(2).sub_(1)

    def rows(self, count: int, size: int) -> Tensor:
        """Return `count` different indices below `size`, ascending."""
        return torch.randperm(size, generator=self._generator)[:count].sort().values.to(self._device)


def _blocks(numel: int) -> list[tuple[int, int]]:
    """Return (how many, how long) the blocks of a vector are; the last one is the power of two that holds the rest."""
    whole, rest = divmod(numel, LARGEST_BLOCK)
    blocks = [(whole, LARGEST_BLOCK)] if whole else []
    return [*blocks, (1, 1 << (rest - 1).bit_length())] if rest else blocks


def _hadamard_(rows: Tensor) -> Tensor:
    """Multiply each row of `[m, 2^p]` by the Hadamard matrix, in place; return `rows`."""
    for row in rows:  # one after the other: each stays in the cache
        half = 1
        while half < len(row):
            pairs = row.view(-1, 2, half)
            first, second = pairs.unbind(dim=1)
            difference = first - second
            first.add_(second)
            second.copy_(difference)
            half *= 2
    return rows
