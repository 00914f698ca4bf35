"""Top-k of the cosine transform: the strongest frequencies of each tile of each weight matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod, sqrt
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from decentral.protocols.codecs.shaped import Shaped, Shapes
from decentral.protocols.codecs.sparse import SLICE, Rows, Sparse, spread, together

LARGEST_SIDE = 64
"""Of a tile."""
MATRIX_BITS, VALUE_BITS = 24, 23
"""Of fixed-point numbers. |D| sums to less than 2^3 in a column: 24 + 3 + 23 + 3 bits do not exceed a float64's 53."""


class DCT(Shaped, Sparse):
    """Keeps the k largest coefficients of each tile's orthonormal cosine transform, DCT-II.

        Z = D_a X D_b^T;   D_n[u, j] = sqrt((1 or 2) / n) cos(pi (2 j + 1) u / (2 n)),   1 for u = 0

    From DeMo (arXiv 2411.19870). A matrix is cut into tiles whose sides are the largest divisors of its own of at most
    64, so a prime side means tiles of one row; tensors of more dimensions are seen as first x rest; vectors are cut
    into pieces of 64 and a shorter one. As the transform keeps norms, ||x||^2 = ||C(x)||^2 + ||x - C(x)||^2 with exact
    values. The way back is computed in fixed point, so that it gives the same bits on every kind of machine.
    """

    name = "dct_topk"
    k: int = Field(default=32, ge=1)
    """Coefficients of a tile that travel."""

    def rows(self, numel: int) -> Sequence[Rows]:
        return [
            Rows(tiles.number, tiles.height * tiles.width, min(self.k, tiles.height * tiles.width))
            for tiles in _tiles(self.shapes(numel), numel)
        ]

    def pack(self, values: Tensor, payload: Tensor) -> None:
        super().pack(self.transform(values), payload)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        super().unpack(payload, values)
        self._transform_back(values)

    def travelled(self, values: Tensor) -> Tensor:
        arrived = super().travelled(self.transform(values))
        self._transform_back(arrived)
        return arrived

    def transform(self, values: Tensor) -> Tensor:
        """Return the coefficients `[n]` of `values` `[n]`, tile after tile."""
        coefficients = torch.empty_like(values)
        for batch in self._batches(values.numel()):
            tiles = torch.cat([each.cut(values) for each in batch])
            spread(_forward(tiles).view(-1), coefficients, [each.span for each in batch])
        return coefficients

    def _transform_back(self, coefficients: Tensor) -> None:
        """Undo `transform` in place."""
        for batch in self._batches(coefficients.numel()):
            blocks = together(coefficients, [each.span for each in batch]).view(-1, batch[0].height, batch[0].width)
            parts = _inverse(blocks).split_with_sizes([each.number for each in batch])
            for each, part in zip(batch, parts, strict=True):
                each.join(part, coefficients)

    def _batches(self, numel: int) -> tuple[tuple[_Tiles, ...], ...]:
        return _batches(self.shapes(numel), numel)


class _Tiles(NamedTuple):
    """`down x across` tiles of `height x width` that make up a matrix, from element `start` of the vector on."""

    start: int
    down: int
    across: int
    height: int
    width: int

    @property
    def number(self) -> int:
        return self.down * self.across

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.number * self.height * self.width)

    def pieces(self) -> Iterator[_Tiles]:
        """Yield as many rows of tiles at a time as fit into the cache together."""
        per_row = self.height * self.across * self.width
        step = max(1, SLICE // per_row)
        for first in range(0, self.down, step):
            yield self._replace(start=self.start + first * per_row, down=min(step, self.down - first))

    def cut(self, values: Tensor) -> Tensor:
        """Return the tiles `[number, height, width]` of `values` `[n]`."""
        matrix = values[self.span].view(self.down, self.height, self.across, self.width)
        return matrix.transpose(1, 2).reshape(-1, self.height, self.width)

    def join(self, tiles: Tensor, values: Tensor) -> None:
        """Undo `cut`: write the tiles to where they belong in `values` `[n]`."""
        matrix = values[self.span].view(self.down, self.height, self.across, self.width)
        matrix.copy_(tiles.view(self.down, self.across, self.height, self.width).transpose(1, 2))


@lru_cache(maxsize=256)
def _tiles(shapes: Shapes, numel: int) -> tuple[_Tiles, ...]:
    """Return the tiles of each tensor; raises `ValueError` unless the tensors make up the vector."""
    if sum(prod(shape) for shape in shapes) != numel:
        raise ValueError(f"a vector of {numel} elements is not made of tensors of shapes {shapes}")
    tiles, start = [], 0
    for shape in shapes:
        rows, columns = shape[0] if len(shape) > 1 else 1, prod(shape[1:]) if len(shape) > 1 else prod(shape)
        if not rows * columns:
            continue
        if rows > 1:
            height, width = _side(rows), _side(columns)
            tiles.append(_Tiles(start, rows // height, columns // width, height, width))
        else:
            whole, rest = divmod(columns, LARGEST_SIDE)
            tiles += [_Tiles(start, whole, 1, 1, LARGEST_SIDE)] * bool(whole)
            tiles += [_Tiles(start + columns - rest, 1, 1, 1, rest)] * bool(rest)
        start += rows * columns
    return tuple(tiles)


@lru_cache(maxsize=256)
def _batches(shapes: Shapes, numel: int) -> tuple[tuple[_Tiles, ...], ...]:
    """Return the vector's tiles, those of equal sides together: small ones are many. A batch fits into the cache."""
    batches: list[list[_Tiles]] = []
    latest: dict[tuple[int, int], tuple[list[_Tiles], int]] = {}
    for tiles in _tiles(shapes, numel):
        for piece in tiles.pieces():
            size = piece.span.stop - piece.span.start
            batch, held = latest.get((piece.height, piece.width), ([], SLICE))
            if held + size > SLICE:
                batch, held = [], 0
                batches.append(batch)
            batch.append(piece)
            latest[piece.height, piece.width] = batch, held + size
    return tuple(map(tuple, batches))


def _side(length: int) -> int:
    return next(side for side in range(min(LARGEST_SIDE, length), 0, -1) if length % side == 0)


@lru_cache(maxsize=LARGEST_SIDE)
def _matrix(size: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return D `[size, size]`: row u is the u-th cosine."""
    angles = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / (2 * size) * torch.outer(angles, 2 * angles + 1)) * sqrt(2 / size)
    matrix[0] = 1 / sqrt(size)
    return matrix.to(device, dtype)


@lru_cache(maxsize=LARGEST_SIDE)
def _fixed_matrix(size: int, device: torch.device) -> Tensor:
    """Return D `[size, size]` in fixed point: whole numbers, float64."""
    fixed: Tensor = (_matrix(size, device) * 2**MATRIX_BITS).round_()
    return fixed


def _forward(tiles: Tensor) -> Tensor:
    """Return the coefficients of tiles `[m, height, width]`, likewise."""
    left, right = (_matrix(side, tiles.device, tiles.dtype) for side in tiles.shape[1:])
    return torch.matmul(torch.matmul(left, tiles), right.T)


def _inverse(blocks: Tensor) -> Tensor:
    """Undo `_forward`, with the same bits wherever it runs.

    Sums of products of floats depend on their order, and so on the processor. Sums of integers do not, and float64
    holds these exactly.
    """
    left, right = (_fixed_matrix(side, blocks.device) for side in blocks.shape[1:])
    exponents = blocks.abs().amax(dim=(1, 2), keepdim=True).view(torch.int32) >> 23
    exponents = exponents.to(torch.int64) - 126  # every |coefficient| < 2^exponent
    fixed = (blocks.double() * _power_of_two(VALUE_BITS - exponents)).round_()
    fixed = torch.matmul(fixed, right).mul_(2.0**-MATRIX_BITS).round_()
    fixed = torch.matmul(left.T, fixed)
    return fixed.mul_(_power_of_two(exponents - VALUE_BITS - MATRIX_BITS)).to(torch.float32)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return 2^exponents, float64, exactly: library functions may be off by a bit."""
    return (exponents + 1023 << 52).view(torch.float64)
