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
from decentral.protocols.codecs.sparse import SLICE, Rows, Sparse

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
            Rows(tiles.down * tiles.across, tiles.height * tiles.width, min(self.k, tiles.height * tiles.width))
            for tiles in _tiles(self.shapes(numel), numel)
        ]

    def pack(self, values: Tensor, payload: Tensor) -> None:
        super().pack(self.transform(values), payload)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        super().unpack(payload, values)
        for tiles, part in self._slices(values):
            part.copy_(_inverse(part, tiles))

    def transform(self, values: Tensor) -> Tensor:
        """Return the coefficients `[n]` of `values` `[n]`, tile after tile."""
        coefficients = torch.empty_like(values)
        for (tiles, part), (_, out) in zip(self._slices(values), self._slices(coefficients), strict=True):
            out.copy_(_forward(part, tiles))
        return coefficients

    def _slices(self, values: Tensor) -> Iterator[tuple[_Tiles, Tensor]]:
        """Yield rows of tiles that fit into the cache together, and their elements, a view of `values`."""
        start = 0
        for tiles in _tiles(self.shapes(values.numel()), values.numel()):
            per_row = tiles.height * tiles.across * tiles.width
            step = max(1, SLICE // per_row)
            for first in range(0, tiles.down, step):
                down = min(step, tiles.down - first)
                yield tiles._replace(down=down), values[start : start + down * per_row]
                start += down * per_row


class _Tiles(NamedTuple):
    """`down x across` tiles of `height x width` that make up a matrix."""

    down: int
    across: int
    height: int
    width: int


@lru_cache(maxsize=256)
def _tiles(shapes: Shapes, numel: int) -> tuple[_Tiles, ...]:
    """Return the tiles of each tensor; raises `ValueError` unless the tensors make up the vector."""
    if sum(prod(shape) for shape in shapes) != numel:
        raise ValueError(f"a vector of {numel} elements is not made of tensors of shapes {shapes}")
    tiles = []
    for shape in shapes:
        rows, columns = shape[0] if len(shape) > 1 else 1, prod(shape[1:]) if len(shape) > 1 else prod(shape)
        if not rows * columns:
            continue
        if rows > 1:
            height, width = _side(rows), _side(columns)
            tiles.append(_Tiles(rows // height, columns // width, height, width))
            continue
        whole, rest = divmod(columns, LARGEST_SIDE)
        tiles += [_Tiles(whole, 1, 1, LARGEST_SIDE)] * bool(whole) + [_Tiles(1, 1, 1, rest)] * bool(rest)
    return tuple(tiles)


def _side(length: int) -> int:
    return next(side for side in range(min(LARGEST_SIDE, length), 0, -1) if length % side == 0)


@lru_cache(maxsize=LARGEST_SIDE)
def _matrix(size: int) -> Tensor:
    """Return D `[size, size]` float64: row u is the u-th cosine."""
    angles = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / (2 * size) * torch.outer(angles, 2 * angles + 1)) * sqrt(2 / size)
    matrix[0] = 1 / sqrt(size)
    return matrix


def _forward(values: Tensor, tiles: _Tiles) -> Tensor:
    """Return the tiles' coefficients, tile after tile, of the elements of whole rows of tiles."""
    down, across, height, width = tiles
    left, right = (_matrix(side).to(values) for side in (height, width))
    columns = torch.matmul(left, values.view(down, height, across * width))
    both = torch.matmul(columns.view(-1, width), right.T)
    return both.view(down, height, across, width).transpose(1, 2).reshape(-1)


def _inverse(coefficients: Tensor, tiles: _Tiles) -> Tensor:
    """Undo `_forward`, with the same bits wherever it runs.

    Sums of products of floats depend on their order, and so on the processor. Sums of integers do not, and float64
    holds these exactly.
    """
    down, across, height, width = tiles
    left, right = ((_matrix(side) * 2**MATRIX_BITS).round_().to(coefficients.device) for side in (height, width))
    blocks = coefficients.view(-1, height, width)
    exponents = blocks.abs().amax(dim=(1, 2), keepdim=True).view(torch.int32) >> 23
    exponents = exponents.to(torch.int64) - 126  # every |coefficient| < 2^exponent
    fixed = (blocks.double() * _power_of_two(VALUE_BITS - exponents)).round_()
    fixed = torch.matmul(fixed, right).mul_(2.0**-MATRIX_BITS).round_()
    fixed = torch.matmul(left.T, fixed)
    values = fixed.mul_(_power_of_two(exponents - VALUE_BITS - MATRIX_BITS)).to(torch.float32)
    return values.view(down, across, height, width).transpose(1, 2).reshape(-1)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return 2^exponents, float64, exactly: library functions may be off by a bit."""
    return (exponents + 1023 << 52).view(torch.float64)
