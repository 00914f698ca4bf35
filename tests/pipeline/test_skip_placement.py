"""Which node holds which stage, against all there are: matchings, tours, and small placements."""

from __future__ import annotations

import random
from itertools import pairwise, permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from decentral.errors import ConfigError
from decentral.pipeline.skip import PlacementEffort, place
from decentral.pipeline.skip.matching import bottleneck_matching
from decentral.pipeline.skip.tour import shortest_tour

SMALL = PlacementEffort(population=8, trials=30, refinements=20)


def best_matching(weights: NDArray[np.float64]) -> float:
    """Return the slowest edge of the best matching, by trying all of them."""
    if weights.shape[0] > weights.shape[1]:
        weights = weights.T
    rows, columns = weights.shape
    return float(min(max(weights[range(rows), list(chosen)]) for chosen in permutations(range(columns), rows)))


def best_tour(weights: list[list[float]]) -> float:
    """Return the length of the best tour, by trying all of them."""
    tours = [(0, *others, 0) for others in permutations(range(1, len(weights)))]
    return min(sum(weights[one][other] for one, other in pairwise(tour)) for tour in tours)


def cost_of(stages: list[list[int]], links: NDArray[np.float64]) -> float:
    """Return 2 PP + the slowest link inside of a stage, by trying all matchings and tours."""
    links = np.maximum(links, links.T)
    between = [[best_matching(links[np.ix_(one, other)]) for other in stages] for one in stages]
    inside = [links[one, other] for nodes in stages for one in nodes for other in nodes if one != other]
    return 2 * (best_tour(between) if len(stages) > 1 else 0.0) + max(inside, default=0.0)


def drawn_links(nodes: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(0.3, 3.0, (nodes, nodes))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (5, 3), (3, 5), (6, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_no_matching_has_a_faster_slowest_link(shape: tuple[int, int], seed: int) -> None:
    weights = np.random.default_rng(seed).integers(1, 12, shape).astype(np.float64)  # small integers: many are equal
    slowest, pairs = bottleneck_matching(weights)
    assert slowest == best_matching(weights) == max(weights[pair] for pair in pairs)
    rows, columns = zip(*pairs, strict=True)
    assert len(set(rows)) == len(set(columns)) == min(shape)


def test_there_is_nothing_to_match_in_an_empty_set() -> None:
    with pytest.raises(ValueError, match=r"weights: \[0, 3\] has nothing to match"):
        bottleneck_matching(np.zeros((0, 3)))


@pytest.mark.parametrize("places", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("seed", range(3))
def test_no_tour_is_shorter(places: int, seed: int) -> None:
    weights = drawn_links(places, seed).tolist()
    length, order = shortest_tour(weights)
    assert length == pytest.approx(best_tour(weights) if places > 1 else 0.0)
    assert (order[0], sorted(order)) == (0, list(range(places)))
    ways = zip(order, (*order[1:], 0), strict=True)
    assert length == pytest.approx(sum(weights[one][other] for one, other in ways if one != other))


def all_placements(nodes: frozenset[int], sizes: list[int]) -> list[list[list[int]]]:
    if not sizes:
        return [[]]
    found = []
    for chosen in {frozenset(order[: sizes[0]]) for order in permutations(sorted(nodes))}:
        found += [[sorted(chosen), *rest] for rest in all_placements(nodes - chosen, sizes[1:])]
    return found


@pytest.mark.parametrize("sizes", [[3, 3], [2, 2, 2], [3, 2, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_of_six_nodes_it_finds_the_best_placement_there_is(sizes: list[int], seed: int) -> None:
    links = drawn_links(6, seed)
    found = place(links.tolist(), sizes, seed, SMALL)
    best = min(cost_of(stages, links) for stages in all_placements(frozenset(range(6)), sizes))
    assert found.cost_s == pytest.approx(best)
    assert cost_of([list(stage) for stage in found.stages], links) == pytest.approx(best)


@pytest.mark.parametrize(("clusters", "stages"), [(2, 2), (2, 3), (3, 4)])
def test_clusters_become_the_rows_of_the_pipeline(clusters: int, stages: int) -> None:
    """Links inside of a cluster take 1 s, others 10 s, and each cluster has a node for every stage.

    Then no microbatch need leave its cluster: PP is 1 s a stage, and only averaging inside of a stage takes 10 s.
    """
    cluster = [index % clusters for index in range(clusters * stages)]
    random.Random(4).shuffle(cluster)
    links = [[1.0 if one == other else 10.0 for other in cluster] for one in cluster]
    found = place(links, [clusters] * stages, 0, PlacementEffort(10, 60, 40))
    assert found.cost_s == 2 * stages + 10
    for row in zip(*found.stages, strict=True):
        assert len({cluster[node] for node in row}) == 1


def test_every_node_holds_one_stage_and_stage_0_is_as_large_as_it_says() -> None:
    sizes = [5, 3, 2, 3, 3]
    found = place(drawn_links(16, 1).tolist(), sizes, 0, PlacementEffort(4, 5, 5))
    assert len(found.stages[0]) == 5
    assert sorted(map(len, found.stages)) == sorted(sizes)
    assert sorted(node for stage in found.stages for node in stage) == list(range(16))


def test_the_same_seed_places_the_same() -> None:
    links = drawn_links(12, 2).tolist()
    assert place(links, [3, 3, 3, 3], 5, SMALL) == place(links, [3, 3, 3, 3], 5, SMALL)
    assert len({place(links, [3, 3, 3, 3], seed, PlacementEffort(2, 0, 0)) for seed in range(4)}) > 1


def test_more_effort_is_worth_it() -> None:
    links = drawn_links(12, 2).tolist()
    costs = [place(links, [3, 3, 3, 3], 0, PlacementEffort(8, trials, 20)).cost_s for trials in (0, 40)]
    assert costs[1] < costs[0]


@pytest.mark.parametrize(
    ("sizes", "effort", "message"),
    [
        ([2, 2], SMALL, r"sizes: \[2, 2\] are 4 nodes, and there are 5; take as many"),
        ([5, 0], SMALL, r"sizes: \[5, 0\] .* at least one for each stage"),
        ([3, 2], PlacementEffort(population=1), r"effort: .* take a population of 2 or more"),
        ([3, 2], PlacementEffort(trials=-1), r"effort: .* no number below 0"),
    ],
)
def test_what_is_no_placement_is_refused(sizes: list[int], effort: PlacementEffort, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(drawn_links(5, 0).tolist(), sizes, 0, effort)
