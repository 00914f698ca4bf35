"""PowerSGD: each weight matrix as a product of two thin ones, which are averaged one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from decentral.phantom import Phantom
from decentral.protocols.codecs.coder import RESIDUAL, Coder, Reduce, SlotMaker
from decentral.protocols.codecs.dense import Float32
from decentral.protocols.codecs.feedback import all_finite
from decentral.protocols.codecs.shaped import Shaped, Shapes
from decentral.replica import seed_of
from decentral.wire import Packet

DEPENDENT = 1e-6
"""A column of which so little is left lies in the span of those before it, as far as float32 can tell."""


class PowerSGD(Shaped):
    """Sends rank-r factors of each matrix and remembers what they left out.

        A_i = M_i + E_i
        P = orthonormalise(mean_i A_i Q);   Q_i = A_i^T P;   Q <- mean_i Q_i
        the mean is P Q^T;   E_i <- A_i - P Q_i^T

    Vogels et al., arXiv 1905.13727: one step of power iteration a round, from the Q of the round before. E_i is what
    the worker's own projection left out, as in the authors' later library: with the averaged Q, as the paper has it,
    residuals of unequal workers grow without bound. Tensors of more than two dimensions are seen as first x rest;
    vectors, and matrices that would not shrink enough, travel in float32 with P.

    To one receiver go the P and Q of the vector itself.
    """

    name = "powersgd"
    loss = "contractive"
    linear = True
    phases = 2
    rank: int = Field(default=2, ge=1)
    """Columns of P and Q."""
    min_compression: float = Field(default=2.0, ge=1)
    """Matrices whose factors are not so many times smaller travel as they are."""

    def coder(self, slot: SlotMaker) -> Coder:
        return _PowerCoder(self, slot)

    def wire_bytes(self, numel: int) -> int:
        return 4 * self.plan(numel).numel

    def pack(self, values: Tensor, payload: Tensor) -> None:
        plan = self.plan(values.numel())
        left = plan.orthonormal(plan.project(values, plan.first_right(values)))
        payload.view(torch.float32).copy_(torch.cat([left, plan.right(values, left)]))

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        plan = self.plan(values.numel())
        factors = payload.view(torch.float32)
        values.copy_(plan.product(factors[: plan.left_numel], factors[plan.left_numel :]))

    def plan(self, numel: int) -> Plan:
        """Return how a vector of `numel` elements is made of matrices and other tensors."""
        return _plan(self.shapes(numel), numel, self.rank, self.min_compression)


class _Matrix(NamedTuple):
    """`rows x columns` elements from `start` on; `rank` 0 says that they travel as they are."""

    start: int
    rows: int
    columns: int
    rank: int

    def of(self, values: Tensor) -> Tensor:
        return values[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


class Plan:
    """Where the matrices of a vector lie, and its two factors, each as one flat vector.

    The left one holds P `[rows, rank]` of each matrix, then the elements of all tensors without factors; the right one
    holds Q `[columns, rank]` of each matrix. `numel` is what both have together.
    """

    def __init__(self, matrices: Sequence[_Matrix]) -> None:
        self._matrices = [each for each in matrices if each.rank]
        self._others = [each for each in matrices if not each.rank]
        self._left_sizes = [each.rows * each.rank for each in self._matrices]
        self._right_sizes = [each.columns * each.rank for each in self._matrices]
        self.left_numel = sum(self._left_sizes) + sum(each.rows * each.columns for each in self._others)
        self.right_numel = sum(self._right_sizes)
        self.numel = self.left_numel + self.right_numel

    def first_right(self, like: Tensor) -> Tensor:
        """Return the Q of the first round: Gaussian, the same at every worker."""
        generator = torch.Generator().manual_seed(seed_of("powersgd", self.right_numel))
        return torch.randn(self.right_numel, generator=generator).to(like.device)

    def project(self, values: Tensor, right: Tensor) -> Tensor:
        """Return A Q of each matrix A in `values`, and the other elements."""
        products = [each.of(values) @ q for each, q in zip(self._matrices, self._rights(right), strict=True)]
        return _flat([*products, *(each.of(values) for each in self._others)], values)

    def orthonormal(self, left: Tensor) -> Tensor:
        """Return `left` with the columns of each A Q made orthonormal."""
        factors, others = self._lefts(left)
        return _flat([*(orthonormalise(p) for p in factors), others], left)

    def right(self, values: Tensor, left: Tensor) -> Tensor:
        """Return Q = A^T P."""
        factors, _ = self._lefts(left)
        return _flat([each.of(values).T @ p for each, p in zip(self._matrices, factors, strict=True)], values)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return P Q^T of each matrix and the other elements in their places, the same bits everywhere.

        Column by column, as what a matrix product comes to depends on the processor.
        """
        values = left.new_empty(sum(each.rows * each.columns for each in (*self._matrices, *self._others)))
        factors, others = self._lefts(left)
        for each, p, q in zip(self._matrices, factors, self._rights(right), strict=True):
            matrix = each.of(values)
            torch.mul(p[:, :1], q[:, 0], out=matrix)
            for column in range(1, each.rank):
                matrix += p[:, column, None] * q[:, column]
        for each in self._others:
            elements, others = others[: each.rows * each.columns], others[each.rows * each.columns :]
            each.of(values).view(-1).copy_(elements)
        return values

    def left_out(self, values: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return A - P Q^T of each matrix, and zeros for the other elements."""
        rest = values - self.product(left, right)
        for each in self._others:
            each.of(rest).zero_()
        return rest

    def next_right(self, right: Tensor, previous: Tensor) -> Tensor:
        """Return the Q to begin the next round with: of unit length, lest it shrink or grow with the gradients.

        A column that has nothing of its own, as when A = 0, would have nothing ever after: it stays what it was.
        """
        pairs = zip(self._rights(right), self._rights(previous), strict=True)
        bases = [(orthonormalise(new), old) for new, old in pairs]
        return _flat([torch.where(basis.any(dim=0), basis, old) for basis, old in bases], right)

    def _lefts(self, left: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return P of each matrix, and the other elements."""
        *factors, others = torch.split(left, [*self._left_sizes, self.left_numel - sum(self._left_sizes)])
        return [p.view(-1, each.rank) for p, each in zip(factors, self._matrices, strict=True)], others

    def _rights(self, right: Tensor) -> list[Tensor]:
        parts = torch.split(right, self._right_sizes) if self._right_sizes else ()
        return [q.view(-1, each.rank) for q, each in zip(parts, self._matrices, strict=True)]


def _flat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like[:0], *(part.reshape(-1) for part in parts)])


@lru_cache(maxsize=256)
def _plan(shapes: Shapes, numel: int, rank: int, min_compression: float) -> Plan:
    """Return the plan; raises `ValueError` unless the tensors make up the vector."""
    if sum(prod(shape) for shape in shapes) != numel:
        raise ValueError(f"a vector of {numel} elements is not made of tensors of shapes {shapes}")
    matrices = []
    start = 0
    for shape in shapes:
        size = prod(shape)
        rows = shape[0] if len(shape) > 1 and size else 1
        columns = size // rows
        r = min(rank, rows, columns)
        gains = size >= min_compression * r * (rows + columns)
        matrices.append(_Matrix(start, rows, columns, r if gains else 0))
        start += size
    return Plan(matrices)


def orthonormalise(columns: Tensor) -> Tensor:
    """Return an orthonormal basis `[m, r]` of the columns of `[m, r]` float32; zeros for what depends on those before.

    Gram-Schmidt, twice for each column, in float64 and with sums in a fixed order: workers with different processors
    go on from the same bits.
    """
    basis = columns.double()
    for index in range(basis.shape[1]):
        column, before = basis[:, index : index + 1], basis[:, :index]
        length = _sum(column * column).sqrt()
        for _ in range(2 if index else 0):
            shadows = before * _sum(before * column)
            for shadow in shadows.unbind(dim=1):
                column -= shadow[:, None]
        rest = _sum(column * column).sqrt() if index else length
        column *= torch.where(rest > DEPENDENT * length, 1 / rest, 0.0)
    return basis.to(torch.float32)


def _sum(values: Tensor) -> Tensor:
    """Return the sums `[n]` of the columns of `[m, n]`, by halves: every machine adds the same pairs."""
    while len(values) > 1:
        half = len(values) // 2
        paired = values[:half] + values[half : 2 * half]
        if len(values) % 2:
            paired[0] += values[-1]
        values = paired
    return values[0]


class _Offer(NamedTuple):
    """What was made of `values`: P, the worker's own Q, the slot of the warm start and its next value."""

    plan: Plan
    values: Tensor
    left: Tensor
    right: Tensor
    slot: Tensor
    next_right: Tensor


class _PowerCoder(Coder):
    """A mean begins with the Q that all workers share; packets to one receiver improve a Q of the worker's own."""

    def __init__(self, codec: PowerSGD, slot: SlotMaker) -> None:
        super().__init__(codec)
        self._power, self._slot = codec, slot
        self._values: Tensor | None = None
        self._offer: _Offer | None = None

    async def mean(self, values: Tensor, reduce: Reduce) -> Tensor:
        plan = self._power.plan(len(values))
        if not isinstance(values, Tensor):  # a phantom: sizes alone
            await reduce(Phantom(plan.left_numel), Float32())
            if plan.right_numel:
                await reduce(Phantom(plan.right_numel), Float32())
            return values
        offered, q = self._begin(values, plan, "q")
        left = plan.orthonormal(await reduce(plan.project(offered, q), Float32()))
        own = plan.right(offered, left)
        right = await reduce(own, Float32()) if plan.right_numel else own
        self._offer = _Offer(plan, offered, left, own, q, plan.next_right(right, q))
        return plan.product(left, right)

    def encode(self, values: Tensor) -> Packet:
        if not isinstance(values, Tensor):
            return self.codec.encode(values)
        plan = self._power.plan(len(values))
        offered, q = self._begin(values, plan, "own_q")
        left = plan.orthonormal(plan.project(offered, q))
        right = plan.right(offered, left)
        self._offer = _Offer(plan, offered, left, right, q, plan.next_right(right, q))
        payload = torch.cat([left, right]).view(torch.uint8).cpu()
        return Packet(self.codec.spelling(), len(values), len(payload), payload)

    def commit(self) -> None:
        offer = self._offer
        if offer is not None and all_finite(offer.values):
            self._residual(offer.values).copy_(offer.plan.left_out(offer.values, offer.left, offer.right))
            offer.slot.copy_(offer.next_right)
        self.undo()

    def abort(self) -> None:
        if self._values is not None and all_finite(self._values):
            self._residual(self._values).copy_(self._values)
        self.undo()

    def undo(self) -> None:
        self._values = self._offer = None

    def _begin(self, values: Tensor, plan: Plan, slot: str) -> tuple[Tensor, Tensor]:
        """Return A, all that is to be sent, and the Q to begin with."""
        self._offer = None
        self._values = values + self._residual(values)
        return self._values, self._slot(slot, plan.first_right(values))

    def _residual(self, like: Tensor) -> Tensor:
        return self._slot(RESIDUAL, torch.zeros_like(like))
