"""Which node holds which stage: a genetic search for stages whose nodes are near one another and near the next ones'.

The problem is that of DT-FM (Yuan et al., *Decentralized Training of Foundation Models in Heterogeneous Environments*,
NeurIPS 2022, arXiv 2206.01288), as SkipPipe's code has it: from it are what is minimised, crossover at five points,
and the refinement by cycles. Ours are that the tour is closed, since microbatches go back to their origin for the loss,
that a cycle is drawn rather than searched for, and how a child comes to stages of the right sizes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from decentral.errors import ConfigError
from decentral.pipeline.skip.matching import bottleneck_matching
from decentral.pipeline.skip.tour import shortest_tour
from decentral.replica import seed_of

CUTS = 5
"""Places at which a child goes on with its other parent's stages."""
Stages = tuple[tuple[int, ...], ...]


class PlacementEffort(NamedTuple):
    """How much work a placement may be. SkipPipe's code has a population of 200 and 8,000 trials."""

    population: int = 20
    trials: int = 100
    """Children. One that is better than the worse of its parents takes that parent's place."""
    refinements: int = 100
    """Cycles of nodes that each child tries."""


class Placement(NamedTuple):
    """Who holds each stage, and what that costs."""

    stages: Stages
    """The nodes of each stage; those at the same place of one stage and of the next are matched with each other, as far
    as the smaller goes."""
    cost_s: float
    """2 PP + the slowest link inside of a stage, in seconds; PP is the shortest tour of the stages from stage 0, and
    between two stages counts the slowest link of the matching that has the fastest such."""


USUAL_EFFORT = PlacementEffort()


def place(
    links: Sequence[Sequence[float]], sizes: Sequence[int], seed: int, effort: PlacementEffort = USUAL_EFFORT
) -> Placement:
    """Return the best placement found of nodes `0 .. N - 1`, the same for the same seed.

    `links` are the seconds between nodes, `[N, N]`, of which the slower direction counts; `sizes[s]` the nodes of stage
    s. Stage 0 has as many as it says; the others follow one another along the tour, each with one of the other sizes.
    Raises `ConfigError` if the sizes are not those of all nodes, or the effort is none.
    """
    if sum(sizes) != len(links) or min(sizes, default=0) < 1:
        raise ConfigError(
            f"sizes: {list(sizes)} are {sum(sizes)} nodes, and there are {len(links)}; take as many, "
            "at least one for each stage"
        )
    if effort.population < 2 or effort.trials < 0 or effort.refinements < 0:
        raise ConfigError(f"effort: {effort}; take a population of 2 or more, and no number below 0")
    return _Search(links, sizes, random.Random(seed_of(seed, "placement"))).run(effort)


class _Search:
    """One genetic search. Who holds what is a list of stages, one for each node."""

    def __init__(self, links: Sequence[Sequence[float]], sizes: Sequence[int], chance: random.Random) -> None:
        one_way = np.asarray(links, dtype=np.float64)
        self._links: NDArray[np.float64] = np.maximum(one_way, one_way.T)
        self._sizes, self._chance = sizes, chance
        self._matched: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        self._inside: dict[tuple[int, ...], float] = {}

    def run(self, effort: PlacementEffort) -> Placement:
        population = [self._scored(self._shuffled()) for _ in range(effort.population)]
        for _ in range(effort.trials):
            one, other = self._chance.sample(range(effort.population), 2)
            child = self._crossed(population[one][1], population[other][1])
            scored = self._refined(self._scored(child), effort.refinements)
            worse = max(one, other, key=lambda index: population[index])
            if scored < population[worse] and scored not in population:
                population[worse] = scored
        cost_s, holders = min(population)
        groups = self._groups(holders)
        _, tour = shortest_tour(self._weights(groups))
        return Placement(_in_rows([groups[group] for group in tour], self._links), cost_s)

    def _shuffled(self) -> list[int]:
        holders = [group for group, size in enumerate(self._sizes) for _ in range(size)]
        self._chance.shuffle(holders)
        return holders

    def _scored(self, holders: list[int]) -> tuple[float, list[int]]:
        groups = self._groups(holders)
        slowest = max(map(self._slowest_inside, groups))
        return 2 * shortest_tour(self._weights(groups))[0] + slowest, holders

    def _groups(self, holders: list[int]) -> list[tuple[int, ...]]:
        groups: list[list[int]] = [[] for _ in self._sizes]
        for node, group in enumerate(holders):
            groups[group].append(node)
        return list(map(tuple, groups))

    def _slowest_inside(self, group: tuple[int, ...]) -> float:
        if group not in self._inside:
            between = self._links[np.ix_(group, group)]
            self._inside[group] = float(np.max(between, where=~np.eye(len(group), dtype=bool), initial=0.0))
        return self._inside[group]

    def _weights(self, groups: Sequence[tuple[int, ...]]) -> list[list[float]]:
        return [[0.0 if one == other else self._slowest_between(one, other) for other in groups] for one in groups]

    def _slowest_between(self, one: tuple[int, ...], other: tuple[int, ...]) -> float:
        pair = (one, other) if one < other else (other, one)
        if pair not in self._matched:
            self._matched[pair] = bottleneck_matching(self._links[np.ix_(*pair)])[0]
        return self._matched[pair]

    def _crossed(self, one: list[int], other: list[int]) -> list[int]:
        """Return a child that has nodes by turns from two parents, between as many cuts as there are."""
        other = self._alike(one, other)
        cuts = {self._chance.randrange(len(one)) for _ in range(CUTS)}
        child, parents = [], (one, other)
        for node in range(len(one)):
            parents = parents[::-1] if node in cuts else parents
            child.append(parents[0][node])
        return self._repaired(child)

    def _alike(self, one: list[int], other: list[int]) -> list[int]:
        """Name the second parent's stages, but stage 0, like those of the first that have the most nodes in common."""
        shared = Counter(zip(other, one, strict=True))
        groups = range(len(self._sizes))
        pairs = [
            (-shared[theirs, ours], theirs, ours)
            for theirs in groups
            for ours in groups
            if self._sizes[theirs] == self._sizes[ours] and (theirs == 0) == (ours == 0)
        ]
        names: dict[int, int] = {}
        for _, theirs, ours in sorted(pairs):
            if theirs not in names and ours not in names.values():
                names[theirs] = ours
        return [names[group] for group in other]

    def _repaired(self, holders: list[int]) -> list[int]:
        """Move nodes, drawn, from stages that have too many to those that have too few."""
        groups = self._groups(holders)
        spare = [
            node
            for group, size in zip(groups, self._sizes, strict=True)
            for node in self._chance.sample(group, max(0, len(group) - size))
        ]
        self._chance.shuffle(spare)
        for index, size in enumerate(self._sizes):
            for _ in range(size - len(groups[index])):
                holders[spare.pop()] = index
        return holders

    def _refined(self, scored: tuple[float, list[int]], cycles: int) -> tuple[float, list[int]]:
        """Try cycles of stages, each of which hands one node to the next, and keep those that cost less."""
        for _ in range(cycles if len(self._sizes) > 1 else 0):
            groups = self._groups(scored[1])
            length = self._chance.randint(2, len(groups))
            cycle = self._chance.sample(range(len(groups)), length)
            holders = list(scored[1])
            for group, receiver in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
                holders[self._chance.choice(groups[group])] = receiver
            tried = self._scored(holders)
            if tried[0] <= scored[0]:  # the slowest link stays the same in many of them: go on from there
                scored = tried
        return scored


def _in_rows(stages: Sequence[tuple[int, ...]], links: NDArray[np.float64]) -> Stages:
    """Return the stages with each one's nodes in the order of those that they are matched with in the stage before."""
    ordered = [list(stages[0])]
    for behind in stages[1:]:
        before = ordered[-1]
        _, pairs = bottleneck_matching(links[np.ix_(before, behind)])
        partners = [behind[column] for _, column in pairs]
        if len(ordered) == 1:
            first = [before[row] for row, _ in pairs]
            ordered[0] = first + [node for node in before if node not in first]
        ordered.append(partners + [node for node in behind if node not in partners])
    return tuple(map(tuple, ordered))
