"""Planned paths: the constraints of SkipPipe on every schedule, what planning is worth, and what cannot be planned."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, pairwise, permutations, product

import pytest

from decentral.errors import ConfigError
from decentral.pipeline.skip import Costs, Schedule, SearchEffort, full, random_skip, replay, search
from decentral.pipeline.skip.demands import Demands
from decentral.pipeline.skip.exchanges import exchanged
from decentral.pipeline.skip.orders import orders_of
from decentral.pipeline.skip.paths import Planner
from decentral.pipeline.skip.routes import Limits, Router, Window
from decentral.pipeline.skip.schedule import Microbatch, schedule_of

Stages = list[list[int]]
QUICK = SearchEffort(width=4, exchanges=200)


def staged(*sizes: int) -> Stages:
    nodes = iter(range(sum(sizes)))
    return [[next(nodes) for _ in range(size)] for size in sizes]


TWENTY = staged(5, 3, 3, 3, 3, 3)
"""The nodes with which SkipPipe was measured: 15 microbatches through 4 of 6 stages, memory for 3."""


def wide_area(seed: int, nodes: int = 20) -> Costs:
    """Return links from 0.4 to 4 s, and passes that take 1.76 s, as between SkipPipe's sites."""
    chance = random.Random(seed)
    return Costs([1.76] * nodes, [[chance.uniform(0.4, 4.0) for _ in range(nodes)] for _ in range(nodes)])


def uniform(nodes: int) -> Costs:
    return Costs([1.0] * nodes, [[0.5] * nodes for _ in range(nodes)])


def order_of(path: tuple[int, ...], stages: Stages) -> list[int]:
    return [next(stage for stage, nodes in enumerate(stages) if node in nodes) for node in path]


def is_allowed(order: list[int]) -> bool:
    """Say whether an order of stages, stage 0 included, is within the limits, straight from their wording."""
    if order[0] != 0 or len(set(order)) < len(order):
        return False
    moves = [order[at] - max(order[:at]) for at in range(1, len(order))]
    back = [-move for move in moves if move < 0]
    return max(moves, default=0) <= 4 and len(back) <= 2 and sum(back) <= 2 and max(back, default=0) <= 1


def loads_of(paths: tuple[tuple[int, ...], ...], stages: Stages) -> tuple[Counter[int], list[int]]:
    """Return how often each node is visited, and each stage but the first."""
    by_node = Counter(node for path in paths for node in path)
    return by_node, [sum(by_node[node] for node in nodes) for nodes in stages[1:]]


def require_all_constraints(schedule: Schedule, stages: Stages, slots: int, length: int, memory: int) -> None:
    asked = [(origin, slot) for slot in range(slots) for origin in stages[0]]
    assert [tuple(each) for each in schedule.microbatches] == asked
    assert [path[0] for path in schedule.paths] == [origin for origin, _ in asked]  # CC1
    orders = [order_of(path, stages) for path in schedule.paths]
    assert all(len(order) == length and is_allowed(order) for order in orders)  # CC2
    by_node, by_stage = loads_of(schedule.paths, stages)
    assert max(by_node.values()) <= memory  # TC1
    quotient, rest = divmod(len(asked) * (length - 1), len(by_stage))
    assert max(by_stage) <= quotient + (rest > 0)  # CC3
    assert sum(by_stage) == len(asked) * (length - 1)


@pytest.mark.parametrize("part_collisions", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_with_the_numbers_used_every_stage_and_every_node_is_visited_equally_often(
    seed: int, part_collisions: bool
) -> None:
    costs = wide_area(seed)
    schedule = search(TWENTY, 3, 4, 3, costs, part_collisions=part_collisions, effort=QUICK)
    require_all_constraints(schedule, TWENTY, 3, 4, 3)
    by_node, by_stage = loads_of(schedule.paths, TWENTY)
    assert by_stage == [9] * 5
    assert set(by_node.values()) == {3}
    assert (schedule.visits, schedule.makespan_s) == replay(schedule.paths, costs)


@pytest.mark.parametrize(
    ("sizes", "slots", "length", "memory"),
    [((1, 1), 1, 2, 1), ((2, 2, 2, 2), 2, 3, 2), ((3, 2, 2, 2), 1, 3, 1), ((4, 1, 2, 3), 1, 2, 2), ((2,) * 9, 2, 6, 4)],
)
def test_constraints_hold_on_other_pipelines(sizes: tuple[int, ...], slots: int, length: int, memory: int) -> None:
    stages = staged(*sizes)
    schedule = search(stages, slots, length, memory, wide_area(1, sum(sizes)), effort=QUICK)
    require_all_constraints(schedule, stages, slots, length, memory)


@pytest.mark.parametrize("stages", [4, 6, 8])
def test_the_orders_of_stages_are_those_allowed_and_no_others(stages: int) -> None:
    for length in range(1, 5):
        for visited in combinations(range(1, stages), length - 1):
            allowed = {order for order in permutations(visited) if is_allowed([0, *order])}
            found = orders_of(frozenset(visited), stages)
            assert (set(found), len(found)) == (allowed, len(allowed))


def all_paths(stages: Stages, origin: int, length: int) -> list[tuple[int, ...]]:
    orders = [order for order in permutations(range(1, len(stages)), length - 1) if is_allowed([0, *order])]
    return [(origin, *nodes) for order in orders for nodes in product(*(stages[stage] for stage in order))]


def yielding(path: tuple[int, ...], costs: Costs, windows: list[Window]) -> float:
    """Return when a microbatch that begins at 0 is back, if it waits before each node until it meets no window."""
    clock_s = 0.0
    stops = [*path, path[0], *reversed(path)]
    factors = [1.0] * len(path) + [costs.loss_share] + [costs.backward_factor] * len(path)
    for at, (node, factor) in enumerate(zip(stops, factors, strict=True)):
        seconds = factor * costs.forward[node]
        while any(each.node == node and each.start_s < clock_s + seconds and clock_s < each.end_s for each in windows):
            clock_s = min(each.end_s for each in windows if each.node == node and each.end_s > clock_s)
        clock_s += seconds
        if at + 1 < len(stops) and stops[at + 1] != node:
            way = (node, stops[at + 1]) if at < len(path) else (stops[at + 1], node)
            clock_s += costs.links[way[0]][way[1]]
    return clock_s


@pytest.mark.parametrize("seed", range(10))
def test_no_route_beside_its_limits_is_faster(seed: int) -> None:
    stages, costs, chance = staged(2, 2, 2, 2, 2), wide_area(seed, 10), random.Random(seed)
    begins = [(node, chance.uniform(0, 25)) for node in chance.choices(range(10), k=8)]
    windows = [Window(node, start, start + chance.uniform(0.5, 6)) for node, start in begins]
    banned = frozenset(chance.sample(range(2, 10), 2))
    route = Router(stages, costs, 4).route(Microbatch(0, 0), Limits(banned, frozenset(windows)))
    assert route is not None
    paths = [path for path in all_paths(stages, 0, 4) if banned.isdisjoint(path)]
    assert route.path in paths
    assert route.end_s == pytest.approx(min(yielding(path, costs, windows) for path in paths))
    assert route.end_s == pytest.approx(yielding(route.path, costs, windows))


def test_whoever_may_not_visit_enough_stages_has_no_route() -> None:
    router = Router(staged(1, 1, 1), uniform(3), 3)
    assert router.route(Microbatch(0, 0), Limits().without([2])) is None
    assert Router(staged(1, 1, 1), uniform(3), 2).route(Microbatch(0, 0), Limits().without([2])) is not None


@pytest.mark.parametrize("seed", range(3))
def test_parted_plans_have_no_two_visits_at_a_node_at_once_but_backward_passes(seed: int) -> None:
    planner = Planner(Demands(TWENTY, 3, 4, 3), 3, wide_area(seed), SearchEffort(4, 0))
    parted = planner.grow(planner.grow([planner.root], planner.overloads), planner.conflicts)
    assert parted
    for plan in parted:
        visits = [visit for route in plan.routes for visit in route.visits]
        for one, other in combinations(visits, 2):
            if one.node == other.node and "forward" in (one.kind, other.kind):
                assert one.end_s <= other.start_s or other.end_s <= one.start_s
        assert set(loads_of(plan.paths, TWENTY)[0].values()) == {3}


@pytest.mark.parametrize("seed", range(3))
def test_parting_collisions_and_exchanging_visits_never_make_an_iteration_longer(seed: int) -> None:
    costs = wide_area(seed)
    plain = search(TWENTY, 3, 4, 3, costs, part_collisions=False, effort=QUICK)
    parted = search(TWENTY, 3, 4, 3, costs, effort=SearchEffort(QUICK.width, exchanges=0))
    whole = search(TWENTY, 3, 4, 3, costs, effort=QUICK)
    assert whole.makespan_s <= parted.makespan_s <= plain.makespan_s


def test_exchanges_shorten_a_blind_schedule_and_leave_every_node_as_many_visits() -> None:
    costs = wide_area(0)
    blind = random_skip(TWENTY, 3, 4, 3, costs, 0)
    better = schedule_of(blind.microbatches, exchanged(blind.paths, TWENTY, costs, 300, random.Random(0)), costs)
    require_all_constraints(better, TWENTY, 3, 4, 3)
    assert loads_of(better.paths, TWENTY) == loads_of(blind.paths, TWENTY)
    assert better.makespan_s < blind.makespan_s


@pytest.mark.parametrize("seed", range(3))
def test_planned_skipping_is_faster_than_blind_skipping_and_that_than_none(seed: int) -> None:
    costs = wide_area(seed)
    planned = search(TWENTY, 3, 4, 3, costs, effort=QUICK)
    blind = random_skip(TWENTY, 3, 4, 3, costs, seed)
    assert planned.makespan_s < blind.makespan_s < full(TWENTY, 3, costs).makespan_s


@pytest.mark.parametrize("seed", range(4))
def test_of_a_small_pipeline_it_finds_the_best_schedule_there_is(seed: int) -> None:
    """Three microbatches, each through two of three more stages, and every node visited once."""
    stages, costs = staged(3, 2, 2, 2), wide_area(seed, 9)
    candidates = product(*(all_paths(stages, origin, 3) for origin in stages[0]))
    feasible = [paths for paths in candidates if set(loads_of(paths, stages)[0].values()) == {1}]
    feasible = [paths for paths in feasible if loads_of(paths, stages)[1] == [2, 2, 2]]
    best = min(replay(paths, costs).makespan_s for paths in feasible)
    assert search(stages, 1, 3, 1, costs).makespan_s == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_a_single_microbatch_takes_the_path_of_least_cost(seed: int) -> None:
    stages, costs = staged(1, 3, 3, 3, 3), wide_area(seed, 13)
    schedule = search(stages, 1, 3, 1, costs, effort=QUICK)
    best = min(costs.alone(path) for path in all_paths(stages, 0, 3))
    assert schedule.makespan_s == pytest.approx(best)
    assert costs.alone(schedule.paths[0]) == pytest.approx(best)


@pytest.mark.parametrize("sizes", [(1,) * 6, (3,) * 4])
def test_through_all_stages_of_a_uniform_network_it_is_the_ordinary_pipeline(sizes: tuple[int, ...]) -> None:
    stages, costs = staged(*sizes), uniform(sum(sizes))
    schedule = search(stages, 1, len(sizes), 1, costs, effort=QUICK)
    assert [order_of(path, stages) for path in schedule.paths] == [list(range(len(sizes)))] * sizes[0]
    assert schedule.makespan_s == pytest.approx(full(stages, 1, costs).makespan_s)


@pytest.mark.parametrize("length", [3, 4, 6])
def test_who_skips_stages_computes_that_much_less(length: int) -> None:
    stages = staged(*[5] * 6)
    everything = full(stages, 1, uniform(30))
    schedule = search(stages, 1, length, 1, uniform(30), effort=QUICK)
    for visits, of_all in zip(schedule.visits, everything.visits, strict=True):
        seconds, whole = (
            sum(visit.end_s - visit.start_s for visit in each if visit.kind == "forward") for each in (visits, of_all)
        )
        assert seconds == pytest.approx(whole * length / 6)


def test_the_same_seed_plans_the_same() -> None:
    costs = wide_area(0)
    plans = [search(TWENTY, 3, 4, 3, costs, seed=seed, effort=QUICK) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[2] != plans[0]


def test_the_full_pipeline_keeps_to_rows_as_far_as_there_are_any_and_shares_out_the_rest() -> None:
    schedule = full(TWENTY, 3, wide_area(0))
    assert all(order_of(path, TWENTY) == [0, 1, 2, 3, 4, 5] for path in schedule.paths)
    by_node, by_stage = loads_of(schedule.paths, TWENTY)
    assert by_stage == [15] * 5
    assert {by_node[node] for nodes in TWENTY[1:] for node in nodes} == {5}
    rows = {path for path in schedule.paths if path[0] in (0, 1, 2)}
    assert rows == {tuple(nodes[place] for nodes in TWENTY) for place in range(3)}
    narrow = full(staged(2, 4), 2, wide_area(0, 6))
    assert sorted(path[1] for path in narrow.paths) == [2, 3, 4, 5]


def test_the_full_pipeline_waits_where_it_has_no_memory() -> None:
    costs = wide_area(0)
    times = [full(TWENTY, 3, costs, memory).makespan_s for memory in (2, 3, 5, None)]
    assert all(less > more for less, more in pairwise(times[:3]))
    assert times[2] == times[3]


def test_blind_skipping_keeps_the_constraints_and_does_not_know_the_costs() -> None:
    schedules = [random_skip(TWENTY, 3, 4, 3, wide_area(seed), 7) for seed in (0, 1)]
    for schedule in schedules:
        require_all_constraints(schedule, TWENTY, 3, 4, 3)
    assert schedules[0].paths == schedules[1].paths
    assert schedules[0].makespan_s != schedules[1].makespan_s
    assert random_skip(TWENTY, 3, 4, 3, wide_area(0), 8).paths != schedules[0].paths


@pytest.mark.parametrize(
    ("stages", "slots", "length", "memory", "message"),
    [
        ([[0]], 1, 2, 1, r"stages: \[\[0\]\]; take two or more, each with nodes of its own"),
        ([[0], []], 1, 2, 1, r"stages: .* each with nodes of its own"),
        ([[0], [0]], 1, 2, 1, r"stages: .* each with nodes of its own"),
        (staged(1, 1), 1, 1, 1, r"length: 1 is not allowed; a microbatch visits 2 to 2 stages \(CC1\)"),
        (staged(1, 1), 1, 3, 1, r"length: 3 is not allowed"),
        (staged(1, 1), 0, 2, 1, r"slots, memory: 0 and 1; take 1 or more of each"),
        (staged(1, 1), 4, 2, 3, r"slots: each node of stage 0 starts 4 .* memory for 3 \(TC1\); take at most 3"),
        (staged(4, 1, 2, 2), 3, 3, 3, r"memory: stage 1 has 1 nodes for 3 .* equally often, 8 times \(TC1, CC3\)"),
        (staged(2, 1, 1, 1), 1, 3, 1, r"memory: 2 microbatches are to visit 2 stages each .* 3 such visits"),
        (staged(9, *[1] * 9), 1, 2, 1, r"is at 1 to 1 of stages 1 to 4, .* \(CC2, CC3\); take a larger length"),
        (staged(9, *[2] * 9), 1, 3, 2, r"is at 1 to 2 of stages 1 to 4, .* \(CC2, CC3\)"),
    ],
)
def test_what_no_schedule_can_meet_is_refused_by_the_constraint_it_breaks(
    stages: Stages, slots: int, length: int, memory: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(stages, slots, length, memory, uniform(sum(map(len, stages))), effort=QUICK)
