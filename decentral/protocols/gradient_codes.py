"""Which gradients a worker sums for gradient coding, with which weights, and how the sum of all is got back."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor

from decentral.replica import seed_of

NO_SUM = 1e-8
"""Largest error of a coefficient of a sum that is taken for the sum."""


@lru_cache(maxsize=16)
def code_matrix(workers: int, stragglers: int, seed: int) -> Tensor:
    """Return B, [n, n] float64, such that any n - s of its rows have the row of ones in their span.

    Row i holds the weights of the gradients that worker i computes, s + 1 of which are not zero.
    """
    load = stragglers + 1
    if workers % load == 0:
        return torch.kron(torch.eye(workers // load, dtype=torch.float64), torch.ones(load, load, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed_of(seed, "gradient coding", workers, stragglers))
    checks = torch.randn(stragglers, workers, generator=generator, dtype=torch.float64)
    checks[:, -1] = -checks[:, :-1].sum(dim=1)
    matrix = torch.zeros(workers, workers, dtype=torch.float64)
    for row in range(workers):
        others = [(row + step) % workers for step in range(1, load)]
        matrix[row, row] = 1
        matrix[row, others] = -torch.linalg.solve(checks[:, others], checks[:, row])
    return matrix


def decoding(code: Tensor, came: Collection[int]) -> dict[int, float] | None:
    """Return by how much each push counts in the sum of all gradients; None if the pushes that came do not give it."""
    pushes = sorted(came)
    if len(pushes) * int((code[0] != 0).sum()) < len(code):  # not every gradient is among them
        return None
    rows = code[pushes].T
    ones = torch.ones(len(code), 1, dtype=torch.float64)
    weights = torch.linalg.lstsq(rows, ones, driver="gelsd").solution
    if float((rows @ weights - ones).abs().max()) > NO_SUM:
        return None
    return dict(zip(pushes, weights.view(-1).tolist(), strict=True))
