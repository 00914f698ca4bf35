"""From a fleet to a network: what a run file says of links, measured on messages."""

from __future__ import annotations

import asyncio
import csv
import math
import statistics
from importlib import resources
from typing import Any

import pytest

from decentral.config import Run, validated
from decentral.fleet import Fleet
from decentral.sim.clock import VirtualLoop
from decentral.sim.links import DAY_S, Links
from decentral.sim.loss import mathis_bps, timeouts_s
from decentral.sim.network import Flow, Network
from decentral.sim.simulate import simulate

MIB = 2**20
DRAWS = 20_000


def links_of(now: float = 0.0, seed: int = 0, **fleet: Any) -> Links:
    checked = Fleet(**fleet)
    checked.check()
    return Links(checked, seed, lambda: now)


def seconds_of(fleet: dict[str, Any], *sends: tuple[float, int, int, int]) -> list[float]:
    """Return how long messages take that are sent as (when, source, to, bytes) on a fleet's network."""
    checked = Fleet(**fleet)
    checked.check()
    loop = VirtualLoop()
    network = Network(loop, **Links(checked, 0, loop.time).options())
    took: dict[int, float] = {}

    def start(index: int, source: int, to: int, nbytes: int) -> None:
        def done(flow: Flow) -> None:
            took[index] = loop.now - flow.started_at
            if len(took) == len(sends):
                everything.set_result(None)

        network.transfer(source, to, nbytes, done)

    everything = loop.create_future()
    for index, (when, *message) in enumerate(sends):
        loop.call_at(when, start, index, *message)
    loop.run_until_complete(everything)
    loop.close()
    return [took[index] for index in range(len(sends))]


# What is not used costs nothing.


def test_a_fleet_without_a_network_section_asks_nothing_of_its_links() -> None:
    options = links_of(workers=[{"count": 3, "up_bps": 5e6}, {}], latency_s=0.07).options()
    assert set(options) == {"up_bps", "down_bps", "latency_s"}
    assert options["up_bps"] == [5e6, 5e6, 5e6, 100e6]
    assert options["down_bps"] == [100e6] * 4
    assert options["latency_s"](0, 3) == 0.07


def test_headers_take_their_share_of_lines_and_of_what_joins_sites() -> None:
    overhead, nbytes = 66 / 1514, 10**6
    fleet = {"workers": [{"site": "a"}, {"site": "b"}], "up_bps": 1e8, "down_bps": 8e6, "latency_s": 0.3}
    for link, bps in (({"source": "a", "to": "b"}, 8e6), ({"source": "a", "to": "b", "bps": 5e6}, 5e6)):
        seconds = seconds_of({**fleet, "network": {"links": [link], "overhead": overhead}}, (0, 0, 1, nbytes))
        assert seconds == [pytest.approx(8 * nbytes / (bps * 1448 / 1514) + 0.3, rel=1e-12)]


# Sites.


def test_two_cloud_regions_are_as_skyplane_measured_them() -> None:
    def cell(name: str) -> float:
        text = (resources.files("decentral.fleet") / "data" / name).read_text()
        row = next(row for row in csv.DictReader(text.splitlines()) if row["src\\dst"] == "aws:us-east-1")
        return float(row["gcp:europe-west4-a"])

    bps, latency_s = cell("skyplane_gbps_2022-01.csv") * 1e9, cell("skyplane_rtt_ms_2022-04.csv") / 2000
    fleet = {"workers": [{"count": 2, "site": "aws:us-east-1"}, {"count": 2, "site": "gcp:europe-west4-a"}]}
    nbytes = 100 * MIB
    (alone,) = seconds_of(fleet, (0, 0, 2, nbytes))
    assert alone == pytest.approx(8 * nbytes / bps + latency_s, rel=1e-12)
    assert seconds_of(fleet, (0, 0, 2, nbytes), (0, 1, 3, nbytes)) == pytest.approx([alone] * 2)  # a cap per pair
    (local,) = seconds_of(fleet, (0, 0, 1, nbytes))
    assert local == pytest.approx(8 * nbytes / 10e9 + 0.0005)  # the card of the measuring machines


def test_a_link_may_differ_by_direction() -> None:
    fleet = {
        "workers": [{"site": "lab"}, {"site": "hut"}],
        "network": {
            "links": [
                {"source": "lab", "to": "hut", "bps": 8e6, "latency_s": 0.3},
                {"source": "hut", "to": "lab", "bps": 2e6, "latency_s": 0.1},
            ]
        },
    }
    assert seconds_of(fleet, (0, 0, 1, 10**6), (0, 1, 0, 10**6)) == pytest.approx([1.3, 4.1])


def test_homes_have_lines_of_their_own_within_the_range_and_latencies_add_up() -> None:
    links = links_of(workers=[{"count": 200, "site": "home"}, {"site": "home", "up_bps": 1e6}])
    assert all(10e6 <= up_bps <= 40e6 for up_bps in links.up_bps[:200])
    assert all(50e6 <= down_bps <= 200e6 for down_bps in links.down_bps)
    assert len(set(links.up_bps[:200])) == 200
    assert links.up_bps[200] == 1e6
    logs = [math.log2(up_bps / 10e6) / 2 for up_bps in links.up_bps[:200]]  # uniform in (0, 1)
    assert statistics.mean(logs) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 200))
    latencies_s = {pair: links.latency_s(*pair) for pair in ((0, 1), (1, 2), (2, 0), (1, 0))}
    assert all(0.01 <= latency_s <= 0.04 for latency_s in latencies_s.values())
    assert latencies_s[0, 1] == pytest.approx(latencies_s[1, 0])
    mine = (latencies_s[0, 1] + latencies_s[2, 0] - latencies_s[1, 2]) / 2  # worker 0's own share
    assert 0.005 <= mine <= 0.02
    again = links_of(workers=[{"count": 300, "site": "home"}])
    assert again.down_bps[:200] == links.down_bps[:200]  # a worker's line does not depend on who else is there
    assert links_of(seed=1, workers=[{"count": 200, "site": "home"}]).up_bps[:200] != links.up_bps[:200]


# Jitter.


def jittery(std_s: float, mean_s: float = 1.0) -> Links:
    return links_of(network={"links": [{"latency_s": mean_s, "jitter_s": std_s}]})


@pytest.mark.parametrize("std_s", [0.1, 0.5, 1.0])
def test_message_times_are_log_normal_of_the_given_mean_and_deviation(std_s: float) -> None:
    links = jittery(std_s)
    draws = [links.latency_s(0, 1) for _ in range(DRAWS)]
    sigma = math.sqrt(math.log(1 + std_s**2))
    normal = [(math.log(draw) + sigma**2 / 2) / sigma for draw in draws]
    assert statistics.mean(normal) == pytest.approx(0, abs=4 / math.sqrt(DRAWS))
    assert statistics.stdev(normal) == pytest.approx(1, abs=4 / math.sqrt(2 * DRAWS))
    assert statistics.mean(draws) == pytest.approx(1, abs=4 * std_s / math.sqrt(DRAWS))
    below = sum(value < 1 for value in normal) / DRAWS
    assert below == pytest.approx(statistics.NormalDist().cdf(1), abs=4 * 0.5 / math.sqrt(DRAWS))


def test_waiting_for_two_messages_takes_what_noloco_says() -> None:
    # NoLoCo's latency model: E max(t1, t2) = (1 + erf(s / 2)) exp(mu + s^2 / 2), and the mean is 1 here.
    links = jittery(0.8)
    sigma = math.sqrt(math.log(1 + 0.8**2))
    waits = [max(links.latency_s(0, 2), links.latency_s(1, 2)) for _ in range(DRAWS)]
    error = 4 * statistics.stdev(waits) / math.sqrt(DRAWS)
    assert statistics.mean(waits) == pytest.approx(1 + math.erf(sigma / 2), abs=error)


def test_a_pairs_draws_do_not_depend_on_what_others_send() -> None:
    quiet, busy = jittery(0.5), jittery(0.5)
    alone = [quiet.latency_s(0, 1) for _ in range(10)]
    among = []
    for _ in range(10):
        busy.latency_s(1, 0)
        busy.latency_s(0, 2)
        among.append(busy.latency_s(0, 1))
    assert among == alone
    assert len(set(alone)) == 10


# Loss, windows, sharing.


def test_loss_caps_a_flow_by_mathis_and_sends_again_what_is_lost() -> None:
    # MSS / RTT x sqrt(3 / 2) / sqrt(p) = 1460 bytes / 0.1 s x 1.2247 / 0.02 = 894,064 bytes/s, of which 0.9996 are new.
    assert mathis_bps(0.0004, 0.1) == pytest.approx(8 * 894_064, rel=1e-5)
    fleet = {"network": {"links": [{"latency_s": 0.05, "loss": 0.0004}]}}
    (took,) = seconds_of(fleet, (0, 0, 1, 10**7))
    assert took == pytest.approx(10**7 / (894_064 * 0.9996) + 0.05, rel=1e-5)  # and its last packet was not lost
    assert mathis_bps(0.0, 0.1) == mathis_bps(0.1, 0.0) == math.inf


def test_a_lost_last_packet_costs_timeouts_that_double() -> None:
    loss = 0.125
    for losses, chance in ((0, 0.9), (0, 0.126), (1, 0.124), (1, 0.0157), (2, 0.0156), (3, 0.0019)):
        assert timeouts_s(loss, 0.1, chance) == 2**losses - 1  # RTO of 1 s: 1, 1 + 2, 1 + 2 + 4
        assert timeouts_s(loss, 2.0, chance) == 6 * (2**losses - 1)  # RTO of 3 RTT
    assert timeouts_s(0.0, 0.1, 0.5) == 0.0
    links = links_of(network={"links": [{"latency_s": 0.05, "loss": loss}]})
    waits = [links.latency_s(0, 1) - 0.05 for _ in range(DRAWS)]
    share = sum(wait > 0.5 for wait in waits) / DRAWS
    assert share == pytest.approx(loss, abs=4 * math.sqrt(loss * (1 - loss) / DRAWS))


def test_a_window_caps_each_flow_at_window_over_round_trip() -> None:
    fleet = {"latency_s": 0.25, "network": {"window_bytes": 500_000}}
    took = seconds_of(fleet, (0, 0, 1, 4 * 10**6), (0, 0, 1, 4 * 10**6))
    assert took == pytest.approx([4.0 + 0.25] * 2)  # 500,000 bytes each 0.5 s, and the line of 100 Mbit/s is not full


@pytest.mark.parametrize(("sharing", "near", "far"), [("fair", 0.5, 0.5), ("rtt_weighted", 0.9, 0.1)])
def test_near_flows_get_more_where_shares_go_by_round_trip_time(sharing: str, near: float, far: float) -> None:
    fleet = Fleet(
        workers=[{"site": "hub"}, {"site": "near"}, {"site": "far"}],
        network={
            "sharing": sharing,
            "links": [{"source": "hub", "to": "near", "latency_s": 0.01}, {"latency_s": 0.09}],
        },
    )
    loop = VirtualLoop()
    network = Network(loop, **Links(fleet, 0, loop.time).options())
    flows = [network.transfer(0, to, 10**8, lambda flow: None) for to in (1, 2)]
    loop.run_until_complete(asyncio.sleep(1.0))
    loop.close()
    assert [flow.rate_bps / 100e6 for flow in flows] == pytest.approx([near, far], rel=1e-9)


# Capacities that change.

DAILY: dict[str, Any] = {"links": [{"bps": 10e6, "daily_dip": 0.4, "busiest_at_s": DAY_S / 4}]}


def test_capacity_falls_and_rises_with_the_hour() -> None:
    clock = 0.0
    links = Links(Fleet(network=DAILY), 0, lambda: clock)
    levels: list[tuple[float, float]] = []
    while clock < DAY_S:
        until = links.next_change(clock)
        level = links.pair_bps(0, 1)
        levels.append((until - clock, level))
        clock = math.nextafter(until, 0.0)
        assert links.pair_bps(0, 1) == level  # nothing changes before
        clock = until
    quietest, busiest = max(level for _, level in levels), min(level for _, level in levels)
    assert 0.6 * 10e6 <= busiest < 0.6005 * 10e6
    assert 0.9995 * 10e6 < quietest <= 10e6
    mean = math.fsum(length * level for length, level in levels) / DAY_S
    assert mean == pytest.approx(10e6 * (1 - 0.4 / 2), rel=1e-9)
    assert levels[24][1] == pytest.approx(busiest)  # a quarter of a day in


def test_a_transfer_of_a_day_has_the_mean_capacity() -> None:
    nbytes = int(10e6 * 0.8 / 8 * DAY_S)
    (took,) = seconds_of({"network": DAILY}, (0, 0, 1, nbytes))
    assert took == pytest.approx(DAY_S, rel=1e-5)


PARTED = {
    "workers": [{"count": 2, "site": "lab"}, {"count": 2, "site": "hut"}],
    "network": {"links": [{"latency_s": 0.0}], "partitions": [{"from_s": 2, "until_s": 60, "side": ["lab"]}]},
}


def test_messages_across_a_partition_stall_and_go_on() -> None:
    nbytes = 50_000_000  # 4 s
    assert seconds_of(
        PARTED,
        (0, 0, 2, nbytes),  # 2 s, cut, 2 s more
        (10, 3, 1, nbytes),  # begins inside
        (10, 0, 1, nbytes),  # on the same side
        (70, 0, 2, nbytes),
    ) == pytest.approx([62.0, 54.0, 4.0005, 4.0])


def test_sides_may_name_workers_and_leave_others_out() -> None:
    partition = {"from_s": 0, "until_s": 9, "side": [0], "other_side": [1, "hut"]}
    fleet = {**PARTED, "network": {"links": [{}], "partitions": [partition]}}
    links = links_of(now=1.0, **fleet)
    cut = {(one, other) for one in range(4) for other in range(4) if links.pair_bps(one, other) == 0.0}
    assert cut == {(0, 1), (1, 0), (0, 2), (2, 0), (0, 3), (3, 0)}
    assert links_of(now=9.0, **fleet).pair_bps(0, 1) == math.inf


# Whole runs.


def make_run(seed: int = 0, **network: Any) -> Run:
    table = {
        "seed": seed,
        "steps": 60,
        "task": {"name": "quadratic", "dimension": 4096},
        "inner": {"name": "sgd", "lr": 0.1},
        "rule": {"name": "diloco", "period": 20},
        "patience_s": 100,
        "fleet": {"workers": [{"count": 2, "site": "aws:us-east-1"}, {"count": 2, "site": "home"}], "network": network},
    }
    return validated(table, "test")


ACROSS = {"source": "aws:us-east-1", "to": "home", "latency_s": 0.04, "jitter_s": 0.01, "loss": 0.002}


def test_the_same_seed_is_the_same_simulation_bit_for_bit() -> None:
    options = {"links": [ACROSS], "sharing": "rtt_weighted", "window_bytes": 65_536}
    records = simulate(make_run(**options), timing_only=True).records
    assert simulate(make_run(**options), timing_only=True).records == records
    assert simulate(make_run(seed=1, **options), timing_only=True).records != records


def test_a_run_survives_a_partition_and_waits_for_it_to_heal() -> None:
    free = simulate(make_run(links=[ACROSS]))
    parted = simulate(make_run(links=[ACROSS], partitions=[{"from_s": 0.5, "until_s": 40, "side": ["home"]}]))
    assert free.seconds < 30 < 40 < parted.seconds < 40 + free.seconds
    assert [item.reason for item in parted.left()] == ["finished"] * 4
    assert all(bool((parted.params[0] == params).all()) for params in parted.params.values())
    assert bool((parted.params[0] == free.params[0]).all())  # late is not lost
