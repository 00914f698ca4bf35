"""Capacities that change, flows that have terms of their own, and what holds whatever happens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scene import MB, MBPS, Scene

from decentral.sim.clock import Deadlock
from decentral.sim.network import FlowState, Terms

# A node's line.


def test_a_line_at_one_percent_and_back(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10, 10], [10, 10])
    scene.send(0, 1, 100)
    scene.at(5.0, lambda: scene.network.set_capacity(0, up_bps=0.1 * MBPS))
    scene.at(15.0, lambda: scene.network.set_capacity(0, up_bps=10 * MBPS))
    assert scene.run() == [15.0 + (100 - 50 - 1) / 10]


def test_a_cut_line_stalls_and_goes_on_where_it_was(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10] * 3, [10] * 3)
    scene.send(0, 1, 100)
    scene.send(2, 1, 20, when=4.0)  # shares the downlink until it is cut at 6 s: 10 each
    scene.send(0, 2, 10, when=7.0)  # while the other two stand still, this one has 0's uplink
    scene.send(2, 1, 0, when=8.0)  # nothing needs no capacity
    scene.at(6.0, lambda: scene.network.set_capacity(1, down_bps=0.0))
    scene.run(until=6.5)
    assert [flow.rate_bps for flow in scene.flows] == [0.0, 0.0]
    scene.at(20.0, lambda: scene.network.set_capacity(1, down_bps=10 * MBPS))
    assert scene.run() == [20.0 + 2.0 + 4.0, 20.0 + 2.0, 8.0, 8.0]


def test_only_what_shares_with_a_changed_line_is_rated_anew(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10] * 4, [10] * 4)
    scene.send(0, 1, 100)
    scene.send(2, 3, 100)
    scene.at(1.0, lambda: scene.network.set_capacity(0, up_bps=5 * MBPS))
    scene.at(2.0, lambda: scene.network.set_capacity(0, up_bps=5 * MBPS))  # no change
    scene.run(until=3.0)
    assert [flow.rated_at for flow in scene.flows] == [1.0, 0.0]


def test_lines_change_for_flows_to_come(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10, 10], [10, 10])
    scene.at(1.0, lambda: scene.network.set_capacity(1, up_bps=2 * MBPS, down_bps=5 * MBPS))
    scene.send(0, 1, 10, when=1.0)
    scene.send(1, 0, 10, when=2.0)
    assert scene.run() == [3.0, 7.0]


@pytest.mark.parametrize("bandwidth_bps", [-1.0, math.inf, math.nan])
def test_capacities_that_make_no_sense_are_refused(scenes: Callable[..., Scene], bandwidth_bps: float) -> None:
    network = scenes([1, math.inf], [1, 1]).network
    with pytest.raises(ValueError, match="uplink of node 0"):
        network.set_capacity(0, up_bps=bandwidth_bps)
    with pytest.raises(ValueError, match="0 to 1"):
        network.set_capacity(2, up_bps=1.0)
    with pytest.raises(ValueError, match="no limit"):
        network.set_capacity(1, up_bps=1.0)


# Pairs that change by themselves.


def level_at(levels: list[float], step_s: float, now: float) -> float:
    return levels[min(int(now // step_s), len(levels) - 1)]


def stepped(scenes: Callable[..., Scene], levels: list[float], step_s: float, **options: Any) -> Scene:
    """Return a scene whose pairs get these Mbit/s in turn, each for so long, and the last one for ever."""

    def pair_bps(src: int, dst: int) -> float:
        return level_at(levels, step_s, scene.loop.now) * MBPS

    def next_change(now: float) -> float:
        index = int(now // step_s) + 1
        return index * step_s if index < len(levels) else math.inf

    scene = scenes([100] * 4, [100] * 4, pair_bps=pair_bps, next_change=next_change, **options)
    return scene


def test_a_pair_follows_its_capacity(scenes: Callable[..., Scene]) -> None:
    scene = stepped(scenes, [4, 1, 0, 2], 10.0)
    scene.send(0, 1, 40 + 10 + 0 + 6)
    scene.send(1, 0, 5, when=9.0)  # 4 before it changes and 1 after
    scene.send(2, 3, 5, when=22.0)  # begins while parted
    assert scene.run() == [33.0, 11.0, 32.5]


def test_a_pair_may_be_without_limit_for_a_time(scenes: Callable[..., Scene]) -> None:
    scene = stepped(scenes, [math.inf, 10, math.inf], 1.0)
    scene.send(0, 1, 210)
    scene.send(0, 2, 10, when=1.5)
    # The second has 10 for half a second, then they share the uplink of 100 for the tenth of a second that it needs.
    assert scene.run() == pytest.approx([3.05, 2.1], rel=1e-12)
    free = scenes([math.inf] * 2, [math.inf] * 2, pair_bps=lambda src, dst: math.inf, next_change=lambda now: math.inf)
    free.send(0, 1, 10, when=1.0)
    assert free.run() == [1.0]


def test_verify_finds_a_change_that_was_missed(scenes: Callable[..., Scene]) -> None:
    scene = stepped(scenes, [4, 1], 10.0)
    scene.send(0, 1, 100)
    scene.run(until=9.0)
    scene.network.verify()
    assert scene.network._change is not None
    scene.network._change.cancel()
    scene.run(until=11.0)
    with pytest.raises(AssertionError, match="the pair 0 -> 1 carries 4000000"):
        scene.network.verify()


def test_a_change_that_would_not_come_later_is_refused(scenes: Callable[..., Scene]) -> None:
    scene = scenes([1] * 2, [1] * 2, pair_bps=lambda src, dst: 1.0, next_change=lambda now: now)
    with pytest.raises(ValueError, match=r"the next change after .* must be later"):
        scene.network.transfer(0, 1, 1, lambda flow: None)


def test_a_deadlock_is_found_though_capacities_would_change_for_ever(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10] * 2, [10] * 2, pair_bps=lambda src, dst: 1 * MBPS, next_change=lambda now: now + 1.0)
    scene.send(0, 1, 5)
    with pytest.raises(Deadlock, match="nothing can happen any more"):
        scene.loop.run_until_complete(scene.loop.create_future())


# Terms.


def test_a_cap_of_its_own_leaves_the_rest_to_others(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10] * 3, [10] * 3, terms=lambda src, dst: Terms(cap_bps=(2 if dst == 1 else math.inf) * MBPS))
    scene.send(0, 1, 10)
    scene.send(0, 1, 10)  # each flow has a cap of its own, not the pair
    scene.send(0, 2, 30)
    assert scene.run() == [5.0, 5.0, 5.0]


def test_what_is_sent_again_takes_up_the_line(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10] * 3, [10] * 3, terms=lambda src, dst: Terms(times_sent=1.25 if dst == 1 else 1.0))
    scene.send(0, 1, 40)
    scene.send(0, 2, 50)
    assert scene.run() == [10.0, 10.0]  # 50 over the line each
    assert scene.network.bytes_received == [0, 40 * MB, 50 * MB]


def test_no_cap_is_left_of_flows_that_are_over(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10] * 3, [10] * 3, terms=lambda src, dst: Terms(cap_bps=1 * MBPS, weight=3))
    for when in range(10):
        scene.send(0, 1, 5, when=when)
    scene.at(3.5, lambda: scene.network.cancel_node(1))
    scene.run()
    assert not scene.network._weights
    assert len(scene.network._capacity) == 6


# Whatever happens.

NODES = 4
seconds = st.floats(0, 20)
bandwidths = st.floats(0.5, 50)
sends = st.tuples(seconds, st.integers(0, NODES - 1), st.integers(1, NODES - 1), st.floats(0, 100))
turns = st.tuples(seconds, st.integers(0, NODES - 1), st.one_of(st.just(0.0), bandwidths), bandwidths)


@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(
    up=st.lists(bandwidths, min_size=NODES, max_size=NODES),
    down=st.lists(bandwidths, min_size=NODES, max_size=NODES),
    levels=st.lists(st.one_of(st.just(0.0), bandwidths, st.just(math.inf)), min_size=1, max_size=6),
    own=st.lists(
        st.tuples(st.one_of(bandwidths, st.just(math.inf)), st.integers(1, 9)), min_size=NODES, max_size=NODES
    ),
    flows=st.lists(sends, min_size=1, max_size=15),
    changes=st.lists(turns, max_size=8),
    cancelled=st.one_of(st.none(), st.tuples(seconds, st.integers(0, NODES - 1))),
)
def test_bytes_are_kept_and_no_cap_is_passed(
    up: list[float],
    down: list[float],
    levels: list[float],
    own: list[tuple[float, int]],
    flows: list[tuple[float, int, int, float]],
    changes: list[tuple[float, int, float, float]],
    cancelled: tuple[float, int] | None,
) -> None:
    """Caps are known to the test alone: what the network thinks its capacities are is not asked."""
    scene = stepped(
        Scene, [*levels, 50.0], 3.0, latency_s=0.25, terms=lambda src, dst: Terms(own[src][0] * MBPS, own[src][1])
    )
    lines = {("up", node): each for node, each in enumerate(up)} | {
        ("down", node): each for node, each in enumerate(down)
    }
    best = dict(lines)  # of all times
    rates: dict[int, list[tuple[float, float]]] = {}  # of each flow: since when, how many bits per second

    def set_lines(node: int, up_now: float, down_now: float) -> None:
        lines["up", node], lines["down", node] = up_now, down_now
        best["up", node], best["down", node] = max(best["up", node], up_now), max(best["down", node], down_now)
        scene.network.set_capacity(node, up_bps=up_now * MBPS, down_bps=down_now * MBPS)

    def check() -> None:
        sending = [flow for flow in scene.flows if flow.state is FlowState.SENDING]
        for (kind, node), line in lines.items():
            users = [flow.rate_bps for flow in sending if node == (flow.src if kind == "up" else flow.dst)]
            assert math.fsum(users) <= line * MBPS * (1 + 1e-9)
        for flow in sending:
            pair = [each.rate_bps for each in sending if (each.src, each.dst) == (flow.src, flow.dst)]
            assert math.fsum(pair) <= level_at([*levels, 50.0], 3.0, scene.loop.now) * MBPS * (1 + 1e-9)
            assert flow.rate_bps <= own[flow.src][0] * MBPS * (1 + 1e-9)
            rates.setdefault(flow.number, []).append((scene.loop.now, flow.rate_bps))

    for node in range(NODES):
        set_lines(node, up[node], down[node])
    for when, src, ahead, size_mb in flows:
        scene.send(src, (src + ahead) % NODES, size_mb, when)
    for when, node, up_now, down_now in changes:
        scene.at(when, lambda node=node, lines_now=(up_now, down_now): set_lines(node, *lines_now))  # type: ignore[misc]
    for node in range(NODES):
        scene.at(25.0, lambda node=node: set_lines(node, 10.0, 10.0))  # type: ignore[misc]
    if cancelled is not None:
        scene.at(cancelled[0], lambda: scene.network.cancel_node(cancelled[1]))
    allocate = scene.network._allocate

    def allocate_and_check() -> None:
        allocate()
        check()

    scene.network._allocate = allocate_and_check  # type: ignore[method-assign]
    try:
        scene.run()
        network = scene.network
        done = [flow for flow in scene.flows if flow.state is FlowState.DONE]
        lost = [flow for flow in scene.flows if flow.state is FlowState.CANCELLED]
        assert len(done) + len(lost) == len(flows)
        assert network.bytes_received == [
            sum(flow.nbytes for flow in done if flow.dst == node) for node in range(NODES)
        ]
        left = [flow for flow in scene.flows if flow.sent_at is not None]
        assert network.bytes_sent == [sum(flow.nbytes for flow in left if flow.src == node) for node in range(NODES)]
        for flow in done:
            assert flow.sent_at is not None
            assert flow.arrived_at == flow.sent_at + flow.latency_s
            since = rates.get(flow.number, [(flow.started_at, 0.0)])  # nothing is never rated
            until = [*(at_s for at_s, _ in since[1:]), flow.sent_at]
            bits = math.fsum((end - at_s) * rate for (at_s, rate), end in zip(since, until, strict=True) if rate)
            assert bits == pytest.approx(8 * flow.nbytes, rel=1e-9, abs=1.0)
            fastest = min(own[flow.src][0], best["up", flow.src], best["down", flow.dst], max(50.0, *levels)) * MBPS
            assert flow.sent_at - flow.started_at >= 8 * flow.nbytes / fastest * (1 - 1e-9) - 1e-9
        assert not network._sending
        assert not network._users
    finally:
        scene.loop.close()


def test_the_same_changes_make_the_same_arrivals_bit_for_bit(scenes: Callable[..., Scene]) -> None:
    def trace() -> list[float | None]:
        scene = stepped(scenes, [3, 0.1, 7, 0, 2.3], 1.75, terms=lambda src, dst: Terms(1.9 * MBPS, src + 1, 1.1))
        for number in range(50):
            scene.send(number % 4, (number + 1 + number % 3) % 4, 0.3 * number, when=number / 7)
        scene.at(3.3, lambda: scene.network.set_capacity(2, up_bps=0.7 * MBPS))
        return scene.run()

    assert trace() == trace()
    assert None not in trace()


def test_a_stalled_flow_may_be_cancelled(scenes: Callable[..., Scene]) -> None:
    scene = scenes([10, 10], [10, 10])
    flow = scene.start(0, 1, 10)
    scene.at(0.5, lambda: scene.network.set_capacity(1, down_bps=0.0))
    scene.at(2.0, lambda: scene.network.cancel(flow))
    scene.loop.run_until_complete(asyncio.sleep(3.0))
    assert flow.state is FlowState.CANCELLED
    assert flow.remaining_bits == 5 * MBPS
