"""How often the edges of a graph ring in gossip in continuous time, and how well the graph then mixes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decentral.protocols.topology import Topology

Edge = tuple[int, int]
"""Two workers, the lower one first."""

EdgeRates = Literal["uniform", "optimal"]
"""How often the edges ring, beside each other: all alike, or so that the fewest meetings do (see `optimal_shares`)."""

DESCENTS = ((8, 100), (64, 100), (512, 150), (4096, 150))
"""Sharpness of the smooth maximum, and steps of gradient descent with it, one after the other."""


def edge_shares(topology: Topology, ids: Sequence[int], rates: EdgeRates) -> dict[Edge, float]:
    """Return the edges of a graph over the workers `ids`, and each one's share of all meetings.

    Raises `ConfigError` if the topology is another graph in every round.
    """
    edges = sorted({(min(a, b), max(a, b)) for a in ids for b in topology.neighbours(a, ids)})
    if rates == "optimal":
        place = {worker: index for index, worker in enumerate(ids)}
        shares = optimal_shares(tuple((place[a], place[b]) for a, b in edges), len(ids))
        return dict(zip(edges, shares, strict=True))
    return dict.fromkeys(edges, 1 / len(edges))


class Clocks(NamedTuple):
    """The edges of a graph with their shares of all meetings, and (chi_1, chi_2) for one meeting in all a unit of time.

    With a total rate of lambda both are 1 / lambda of that.
    """

    shares: dict[Edge, float]
    slow: float
    resistance: float

    def rates(self, total: float) -> dict[Edge, float]:
        """Return how often each edge rings if all together ring so often."""
        return {edge: total * share for edge, share in self.shares.items()}


@functools.lru_cache(maxsize=16)
def clocks(topology: Topology, ids: tuple[int, ...], rates: EdgeRates) -> Clocks:
    """Return the clocks of a graph over the workers `ids`. Cached: in a simulation every worker asks for the same.

    Raises `ConfigError` if the topology is another graph in every round.
    """
    shares = edge_shares(topology, ids, rates)
    return Clocks(shares, *mixing_times(shares, ids))


def mixing_times(rates: Mapping[Edge, float], ids: Sequence[int]) -> tuple[float, float]:
    """Return (chi_1, chi_2) of a connected graph whose edges ring at these rates; in the unit of time.

        Lambda = sum_ij lambda_ij (e_i - e_j)(e_i - e_j)^T;   chi_1 = 1 / (its smallest eigenvalue but zero)
        chi_2 = 1/2 max_ij (e_i - e_j)^T Lambda^+ (e_i - e_j) <= chi_1

    Nabli and Oyallon, DADAO, arXiv 2208.00779: how slowly differences die out, and the largest effective resistance of
    an edge.
    """
    place = {worker: index for index, worker in enumerate(ids)}
    ends = np.array([(place[a], place[b]) for a, b in rates])
    laplacian = np.zeros((len(ids), len(ids)))
    for (a, b), rate in zip(ends, rates.values(), strict=True):
        laplacian[[a, b], [a, b]] += rate
        laplacian[[a, b], [b, a]] -= rate
    inverse = np.linalg.pinv(laplacian, hermitian=True)
    a, b = ends.T
    resistances = inverse[a, a] + inverse[b, b] - 2 * inverse[a, b]
    return float(1 / np.linalg.eigvalsh(laplacian)[1]), float(resistances.max() / 2)


@functools.lru_cache(maxsize=16)
def optimal_shares(edges: tuple[Edge, ...], count: int) -> tuple[float, ...]:
    """Return the edges' shares of all meetings for which chi_1 chi_2 is smallest, and so the rate that DADAO needs.

    Edges are pairs of 0 .. count - 1. The same optimum as the semidefinite programme of DADAO, found by gradient
    descent on the logarithm of the product, with power means in the place of both maxima.
    """
    a, b = torch.tensor(edges).T
    logits = torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)
    for sharpness, steps in DESCENTS:
        optimizer = torch.optim.Adam([logits], lr=3.0 / sharpness**0.5)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            _log_product(logits.softmax(0), a, b, count, sharpness).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
    return tuple(logits.detach().softmax(0).tolist())


def _log_product(shares: Tensor, a: Tensor, b: Tensor, count: int, sharpness: float) -> Tensor:
    """Return log(chi_1 chi_2) up to a constant, the maxima smoothed."""
    incidence = torch.zeros(len(shares), count, dtype=torch.float64)
    edges = torch.arange(len(shares))
    incidence[edges, a], incidence[edges, b] = 1.0, -1.0
    laplacian = incidence.T @ (shares[:, None] * incidence)
    inverse = torch.linalg.inv(laplacian + 1 / count)
    resistances = ((incidence @ inverse) * incidence).sum(dim=1)
    rates = torch.linalg.eigvalsh(laplacian)[1:]
    smooth = (-sharpness * rates.log()).logsumexp(0) + (sharpness * resistances.log()).logsumexp(0)
    product: Tensor = smooth / sharpness
    return product
