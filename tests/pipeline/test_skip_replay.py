"""One iteration replayed: closed forms of one microbatch, queues worked out by hand, and what must hold of any."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from decentral.errors import ConfigError
from decentral.pipeline.skip import Costs, Replay, Visit, replay

SLACK = 1e-9
"""For sums of floats in another order."""


def drawn(nodes: int, seed: int, **factors: float) -> Costs:
    chance = random.Random(seed)
    forward = [chance.uniform(0.5, 2) for _ in range(nodes)]
    return Costs(forward, [[chance.uniform(0, 3) for _ in range(nodes)] for _ in range(nodes)], **factors)


def uniform(nodes: int, forward: float, link: float, **factors: float) -> Costs:
    return Costs([forward] * nodes, [[link] * nodes for _ in range(nodes)], **factors)


def starts(replayed: Replay, microbatch: int) -> list[tuple[int, str, float]]:
    return [(visit.node, visit.kind, visit.start_s) for visit in replayed.visits[microbatch]]


@pytest.mark.parametrize("path", [(0,), (0, 1), (3, 1, 4), (2, 0, 4, 1, 3)])
@pytest.mark.parametrize("factors", [{}, {"loss_share": 0.0, "backward_factor": 2.0}])
def test_a_microbatch_alone_takes_the_closed_form(path: tuple[int, ...], factors: dict[str, float]) -> None:
    costs = drawn(5, 7, **factors)
    share, back = factors.get("loss_share", 0.25), factors.get("backward_factor", 1.5)
    ways = [costs.links[one][other] for one, other in zip(path, path[1:] + path[:1], strict=True) if one != other]
    expected = (1 + back) * sum(costs.forward[node] for node in path) + share * costs.forward[path[0]] + 2 * sum(ways)
    assert costs.alone(path) == pytest.approx(expected)
    assert replay([path], costs).makespan_s == pytest.approx(expected)


def test_it_goes_along_its_path_home_for_the_loss_and_back() -> None:
    costs = Costs([1.0, 2.0, 4.0], [[0, 10, 0], [0, 0, 20], [30, 0, 0]])
    assert replay([(0, 1, 2)], costs).visits[0] == (
        Visit(0, "forward", 0.0, 1.0),
        Visit(1, "forward", 11.0, 13.0),
        Visit(2, "forward", 33.0, 37.0),
        Visit(0, "loss", 67.0, 67.25),
        Visit(2, "backward", 97.25, 103.25),
        Visit(1, "backward", 123.25, 126.25),
        Visit(0, "backward", 136.25, 137.75),
    )


def test_who_comes_first_is_served_first_and_at_the_same_time_the_lower_microbatch() -> None:
    links = [[0.0] * 4 for _ in range(3)] + [[100.0] * 4]
    links[0][3], links[1][3], links[2][3] = 5.0, 4.0, 5.0
    replayed = replay([(0, 3), (1, 3), (2, 3)], Costs([1.0, 1.0, 1.0, 4.0], links))
    assert [starts(replayed, microbatch)[1] for microbatch in range(3)] == [
        (3, "forward", 9.0),
        (3, "forward", 5.0),
        (3, "forward", 13.0),
    ]


def test_a_backward_pass_goes_before_a_forward_pass_that_came_earlier() -> None:
    """Node 1 goes forward with 0 from 1 s to 5 and with 1 from 5 to 9; 2 waits there from 3 on, 0 is back at 5.25."""
    replayed = replay([(0, 1)] * 3, Costs([1.0, 4.0], [[0.0, 0.0], [0.0, 0.0]]))
    assert starts(replayed, 1)[1] == (1, "forward", 5.0)
    assert starts(replayed, 0)[3] == (1, "backward", 9.0)
    assert starts(replayed, 1)[3] == (1, "backward", 15.0)
    assert starts(replayed, 2)[1] == (1, "forward", 21.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_node_does_one_thing_at_a_time_and_never_idles_beside_work(seed: int) -> None:
    chance, costs = random.Random(seed), drawn(8, seed)
    paths = [tuple(chance.sample(range(8), 4)) for _ in range(12)]
    replayed = replay(paths, costs)
    at: dict[int, list[tuple[Visit, float]]] = {}
    for path, visits in zip(paths, replayed.visits, strict=True):
        assert [visit.node for visit in visits] == [*path, path[0], *reversed(path)]
        ready = 0.0
        for visit, then in zip(visits, (*visits[1:], None), strict=True):
            seconds = {"forward": 1.0, "loss": costs.loss_share, "backward": costs.backward_factor}[visit.kind]
            assert visit.end_s - visit.start_s == pytest.approx(seconds * costs.forward[visit.node])
            assert visit.start_s >= ready - SLACK
            at.setdefault(visit.node, []).append((visit, ready))
            if then is not None:
                way = (visit.node, then.node) if visit.kind == "forward" else (then.node, visit.node)
                ready = visit.end_s + (costs.links[way[0]][way[1]] if visit.node != then.node else 0.0)
    for visits_here in at.values():
        visits_here.sort(key=lambda each: each[0].start_s)
        for (before, _), (after, _) in pairwise(visits_here):
            assert before.end_s <= after.start_s + SLACK
        for visit, ready in visits_here:
            if visit.start_s > ready + SLACK:  # it waited: the node had something to do until then
                assert any(other.end_s == pytest.approx(visit.start_s) for other, _ in visits_here if other != visit)
    assert replayed.makespan_s == max(visits[-1].end_s for visits in replayed.visits)


def held_at_most(replayed: Replay, node: int) -> int:
    """Return how many microbatches a node holds at the most, from forward pass to the end of the backward pass."""
    changes = []
    for visits in replayed.visits:
        begins = [visit.start_s for visit in visits if visit.node == node and visit.kind == "forward"]
        ends = [visit.end_s for visit in visits if visit.node == node and visit.kind == "backward"]
        changes += [(time_s, 1) for time_s in begins] + [(time_s, -1) for time_s in ends]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_a_node_holds_no_more_than_it_has_memory_for(memory: int) -> None:
    paths, costs = [(0, 1, 2)] * 4 + [(0, 3, 2)] * 2, drawn(4, 3)
    limited = replay(paths, costs, memory)
    assert [held_at_most(limited, node) for node in (0, 1, 2)] == [memory] * 3
    assert limited.makespan_s > replay(paths, costs).makespan_s
    assert replay(paths, costs, len(paths)) == replay(paths, costs)


def test_one_at_a_time_takes_as_long_as_one_after_the_other() -> None:
    costs = drawn(3, 5)
    assert replay([(0, 1, 2)] * 4, costs, memory=1).makespan_s == pytest.approx(4 * costs.alone((0, 1, 2)))


def test_paths_that_wait_for_one_another_in_a_circle_are_refused() -> None:
    crossing = [(0, 2, 3), (1, 3, 2)]
    with pytest.raises(ConfigError, match=r"memory: with 1 microbatches at each node, those at nodes \[2, 3\] wait"):
        replay(crossing, uniform(4, 1.0, 1.0), memory=1)
    assert replay(crossing, uniform(4, 1.0, 1.0), memory=2).makespan_s > 0


@pytest.mark.parametrize(
    ("forward", "links", "factors", "message"),
    [
        ([1.0, 1.0], [[0.0, 1.0]], {}, r"costs.links: 2 nodes need 2 rows of 2 seconds each"),
        ([1.0], [[0.0, 1.0]], {}, r"costs.links: 1 nodes need 1 rows of 1 seconds"),
        ([1.0, -1.0], [[0.0, 1.0], [1.0, 0.0]], {}, r"costs.forward: -1.0 is not allowed; take a finite number"),
        ([1.0, 1.0], [[0.0, 1.0], [float("inf"), 0.0]], {}, r"costs.links\[1\]: inf is not allowed"),
        ([1.0], [[0.0]], {"loss_share": float("nan")}, r"costs.loss_share: nan is not allowed"),
        ([1.0], [[0.0]], {"backward_factor": -0.5}, r"costs.backward_factor: -0.5 is not allowed"),
    ],
)
def test_costs_that_are_none_are_refused(
    forward: list[float], links: list[list[float]], factors: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Costs(forward, links, **factors)
