"""Weighted max-min shares, against the definition and two independent ways to the same rates."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from scene import MBPS, Scene, check_max_min, draw_instance

from decentral.sim.network import FlowState, Terms, max_min

SEEDS = range(100)


def draw_weighted(seed: int) -> tuple[list[list[str]], dict[str, float], list[int]]:
    """Draw flows, capacities and weights; now and then a resource is cut."""
    rng = random.Random(seed)
    flows, capacity = draw_instance(rng)
    for resource in capacity:
        if rng.random() < 0.05:
            capacity[resource] = 0.0
    most = rng.choice([1, 3, 20])
    return flows, capacity, [rng.randint(1, most) for _ in flows]


def by_bisection(flows: Sequence[Sequence[str]], capacity: Mapping[str, float], weights: Sequence[int]) -> list[float]:
    """Raise the level as far as the capacities allow, freeze what crosses a full resource, and again."""
    rates: dict[int, float] = {flow: math.inf for flow, path in enumerate(flows) if all(map(is_free(capacity), path))}

    def overflows(resource: str, level: float) -> bool:
        users = [flow for flow, path in enumerate(flows) if resource in path]
        total = math.fsum(rates.get(flow, level * weights[flow]) for flow in users)
        return total > capacity[resource] * (1 + 1e-11)

    finite = [resource for resource in capacity if capacity[resource] < math.inf]
    while waiting := [flow for flow in range(len(flows)) if flow not in rates]:
        low, high = 0.0, 1e4
        while high - low > 1e-13 * high and high > 1e-300:
            middle = (low + high) / 2
            low, high = (low, middle) if any(overflows(each, middle) for each in finite) else (middle, high)
        full = {each for each in finite if overflows(each, high * (1 + 1e-10) + 1e-300)}
        rates.update({flow: low * weights[flow] for flow in waiting if full & set(flows[flow])})
    return [rates[flow] for flow in range(len(flows))]


def is_free(capacity: Mapping[str, float]) -> Callable[[str], bool]:
    return lambda resource: capacity[resource] == math.inf


@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_allocation_fits_the_definition(seed: int) -> None:
    flows, capacity, weights = draw_weighted(seed)
    check_max_min(flows, capacity, max_min(flows, capacity, weights), weights)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_flow_of_weight_w_gets_what_w_flows_get_together(seed: int) -> None:
    flows, capacity, weights = draw_weighted(seed)
    copies = [flow for flow, weight in enumerate(weights) for _ in range(weight)]
    parts = max_min([flows[flow] for flow in copies], capacity)
    whole = [
        math.fsum(part for flow, part in zip(copies, parts, strict=True) if flow == each) for each in range(len(flows))
    ]
    assert max_min(flows, capacity, weights) == pytest.approx(whole, rel=1e-12, abs=0)


@pytest.mark.parametrize("seed", range(20))
def test_weighted_allocation_equals_bisection(seed: int) -> None:
    flows, capacity, weights = draw_weighted(seed)
    expected = by_bisection(flows, capacity, weights)
    assert max_min(flows, capacity, weights) == pytest.approx(expected, rel=1e-9, abs=1e-250)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_of_one_change_no_bit(seed: int) -> None:
    flows, capacity, _ = draw_weighted(seed)
    assert max_min(flows, capacity, [1] * len(flows)) == max_min(flows, capacity)


def test_a_far_away_flow_gets_its_share_by_round_trip_time(scenes: Callable[..., Scene]) -> None:
    # Weights 10 : 1 on an uplink of 11; the near flow is through after 1 s, then the far one has it all.
    scene = scenes([11] * 3, [99] * 3, terms=lambda src, dst: Terms(weight=10 if dst == 1 else 1))
    scene.send(0, 1, 10)
    scene.send(0, 2, 12)
    scene.run(until=0.5)
    assert [flow.rate_bps for flow in scene.flows] == [10 * MBPS, 1 * MBPS]
    assert scene.run() == [1.0, 2.0]


@pytest.mark.parametrize("seed", range(10))
def test_weighted_rates_equal_a_global_allocation_at_every_instant(seed: int, scenes: Callable[..., Scene]) -> None:
    rng = random.Random(seed)
    nodes = 8
    weights = {(src, dst): rng.randint(1, 9) for src in range(nodes) for dst in range(nodes)}
    caps = {pair: rng.choice([2.0, 5.0, math.inf]) for pair in weights}  # of each flow, in Mbit/s
    up, down = ([rng.uniform(5, 50) for _ in range(nodes)] for _ in range(2))
    scene = scenes(up, down, terms=lambda src, dst: Terms(caps[src, dst] * MBPS, weights[src, dst]))
    for _ in range(60):
        src, dst = rng.sample(range(nodes), 2)
        scene.send(src, dst, rng.uniform(0, 40), when=rng.uniform(0, 10))
    seen = 0
    for step in range(1, 100):
        scene.run(until=step / 5 + 0.01)
        scene.network.verify()
        sending = [flow for flow in scene.flows if flow.state is FlowState.SENDING]
        paths = [[("up", flow.src), ("down", flow.dst), ("own", flow.number)] for flow in sending]
        capacity = {("up", node): each * MBPS for node, each in enumerate(up)}
        capacity |= {("down", node): each * MBPS for node, each in enumerate(down)}
        capacity |= {("own", flow.number): caps[flow.src, flow.dst] * MBPS for flow in sending}
        heavy = [weights[flow.src, flow.dst] for flow in sending]
        check_max_min(paths, capacity, [flow.rate_bps for flow in sending], heavy)
        seen += len(sending)
    assert seen > 200
