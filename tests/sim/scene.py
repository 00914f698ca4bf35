"""A loop with a network on it, and what it means that an allocation is max-min fair."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from decentral.sim.clock import VirtualLoop
from decentral.sim.network import Flow, FlowState, Network

MBPS = 1e6
MB = 125_000  # bytes that take one second at 1 Mbit/s


class Scene:
    """A loop, a network and the times at which flows arrive."""

    def __init__(self, up: Sequence[float], down: Sequence[float], latency_s: float = 0.0, **options: Any) -> None:
        self.loop = VirtualLoop()
        lines = {"up_bps": [each * MBPS for each in up], "down_bps": [each * MBPS for each in down]}
        self.network = Network(self.loop, **{**lines, "latency_s": lambda src, dst: latency_s, **options})
        self.flows: list[Flow] = []

    def at(self, when: float, action: Callable[[], object]) -> None:
        self.loop.call_at(when, action)

    def send(self, src: int, dst: int, size_mb: float, when: float = 0.0) -> None:
        self.at(when, lambda: self.start(src, dst, size_mb))

    def start(self, src: int, dst: int, size_mb: float) -> Flow:
        flow = self.network.transfer(src, dst, round(size_mb * MB), self.arrived)
        self.flows.append(flow)
        return flow

    def arrived(self, flow: Flow) -> None:
        assert flow.state is FlowState.DONE
        assert flow.arrived_at == self.loop.time()

    def run(self, until: float = 1e6) -> list[float | None]:
        """Run to the end of time and return when each flow arrived, in the order in which they were started."""
        self.loop.run_until_complete(asyncio.sleep(until - self.loop.time()))
        return [flow.arrived_at for flow in self.flows]


def check_max_min(
    flows: Sequence[Sequence[object]],
    capacity: dict[Any, float],
    rates: Sequence[float],
    weights: Sequence[int] | None = None,
) -> None:
    """Assert that the rates are feasible and every flow has a full resource on which no other flow is faster.

    With weights, faster is in proportion to them.
    """
    weighed = weights or [1] * len(flows)
    levels = [rate / weight for rate, weight in zip(rates, weighed, strict=True)]
    used = {key: math.fsum(rate for path, rate in zip(flows, rates, strict=True) if key in path) for key in capacity}
    highest = {
        key: max([level for path, level in zip(flows, levels, strict=True) if key in path], default=0.0)
        for key in capacity
    }
    for key, total in used.items():
        assert total <= capacity[key] * (1 + 1e-12)
    for path, level in zip(flows, levels, strict=True):
        bottlenecks = [key for key in path if used[key] >= capacity[key] * (1 - 1e-12) and capacity[key] < math.inf]
        if level == math.inf:
            assert all(capacity[key] == math.inf for key in path)
        else:
            assert any(level >= highest[key] * (1 - 1e-12) for key in bottlenecks), (path, level)


def draw_instance(rng: random.Random) -> tuple[list[list[str]], dict[str, float]]:
    """Draw up to 60 flows over up to 15 resources of any kind; few distinct capacities make ties, many make none."""
    choices = rng.choice([[rng.uniform(1.0, 100.0) for _ in range(15)], [1.0, 3.0, 10.0], [7.0]])
    capacity = {
        f"link {number}": math.inf if rng.random() < 0.1 else rng.choice(choices)
        for number in range(rng.randint(1, 15))
    }
    flows = [rng.sample(sorted(capacity), rng.randint(0, min(4, len(capacity)))) for _ in range(rng.randint(0, 60))]
    return flows, capacity
