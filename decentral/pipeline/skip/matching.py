"""The matching of two sets of nodes whose slowest link is the fastest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bottleneck_matching(weights: NDArray[np.float64]) -> tuple[float, list[tuple[int, int]]]:
    """Match every row with a column of its own, or every column with a row, whichever are fewer.

    `weights` are `[R, C]` float64, none of them empty. Return the largest weight of the matching that has the least,
    and its pairs (row, column) in ascending order. Edges are added from the lightest on, until augmenting paths
    through them have matched everybody.
    """
    rows, columns = weights.shape
    allowed: list[list[int]] = [[] for _ in range(rows)]
    row_of: dict[int, int] = {}
    matched: set[int] = set()
    for edge in np.argsort(weights, axis=None, kind="stable").tolist():
        row, column = divmod(edge, columns)
        allowed[row].append(column)
        for free in range(rows):
            if free not in matched and _augment(free, allowed, row_of, set()):
                matched.add(free)
        if len(matched) == min(rows, columns):
            return float(weights[row, column]), sorted((row, column) for column, row in row_of.items())
    raise ValueError(f"weights: [{rows}, {columns}] has nothing to match; take at least one row and one column")


def _augment(row: int, allowed: list[list[int]], row_of: dict[int, int], tried: set[int]) -> bool:
    """Find a column for a row, if need be by finding another one for whoever has it; say whether that succeeded."""
    for column in allowed[row]:
        if column not in tried:
            tried.add(column)
            if column not in row_of or _augment(row_of[column], allowed, row_of, tried):
                row_of[column] = row
                return True
    return False
