"""Which gradients a worker sums for gradient coding, with which weights, and how the sum of all is got back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from decentral.members import Members
from decentral.replica import seed_of

DRAWS = 64
"""Random codes of which the one with the smallest weights is taken: large ones make rounding errors large."""
NO_SUM = 1e-8
"""Largest error of a coefficient of a sum that is taken for the sum."""


@lru_cache(maxsize=16)
def code_matrix(workers: int, stragglers: int, seed: int) -> Tensor:
    """Return B, [n, n] float64, such that any n - s of its rows have the row of ones in their span.

    Row i holds the weights of the gradients that worker i computes, s + 1 of which are not zero. Workers are parted
    into groups of s + 1, each of which computes its own gradients s + 1 times; what is left over joins the last group,
    which has a random code.
    """
    load = stragglers + 1
    last = load + workers % load if workers % load else 0
    matrix = torch.zeros(workers, workers, dtype=torch.float64)
    for start in range(0, workers - last, load):
        matrix[start : start + load, start : start + load] = 1
    if last:
        generator = torch.Generator().manual_seed(seed_of(seed, "gradient coding", workers, stragglers))
        drawn = [_random_code(last, stragglers, generator) for _ in range(DRAWS)]
        matrix[-last:, -last:] = min(drawn, key=lambda code: float(code.abs().max()))
    return matrix


def _random_code(workers: int, stragglers: int, generator: torch.Generator) -> Tensor:
    """Return B, [n, n], whose row i has its support at i .. i + s, cyclically, with H B' = 0."""
    checks = torch.randn(stragglers, workers, generator=generator, dtype=torch.float64)
    checks[:, -1] = -checks[:, :-1].sum(dim=1)
    code = torch.eye(workers, dtype=torch.float64)
    for row in range(workers):
        others = [(row + step) % workers for step in range(1, stragglers + 1)]
        code[row, others] = -torch.linalg.solve(checks[:, others], checks[:, row])
    return code


def decoding(code: Tensor, came: Collection[int]) -> dict[int, float] | None:
    """Return how much each row of those that came counts in the row of ones; None if it is not in their span."""
    pushes = sorted(came)
    rows = code[pushes].T
    if not bool((rows != 0).any(dim=1).all()):  # a gradient is not among them: no need to solve anything
        return None
    ones = torch.ones(len(code), 1, dtype=torch.float64)
    weights = torch.linalg.lstsq(rows, ones, driver="gelsd").solution
    if float((rows @ weights - ones).abs().max()) > NO_SUM:
        return None
    return dict(zip(pushes, weights.view(-1).tolist(), strict=True))


@dataclass(slots=True, eq=False)
class Job:
    """Gradients of the workers of `cohort` at `model`, and what `came` of it, by worker: coded as `code` says."""

    cohort: Members
    model: Tensor
    code: Tensor
    came: dict[int, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether what came gives the sum of all gradients."""
        return self._weights() is not None

    def mean(self) -> Tensor | None:
        """Return the mean of all workers' gradients, or None if what came does not give it."""
        weights = self._weights()
        if weights is None:
            return None
        total = torch.zeros_like(self.model)
        for rank, weight in weights.items():
            total.add_(self.came[self.cohort.ids[rank]], alpha=weight / len(self.code))
        return total

    def _weights(self) -> dict[int, float] | None:
        return decoding(self.code, [self.cohort.rank(worker) for worker in self.came])
