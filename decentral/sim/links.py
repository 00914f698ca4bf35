"""From a fleet to a network: who stands where, and what lies between two workers at a time.

Every draw is a function of the run's seed, what is drawn and for whom: a line's bandwidth of the worker, a message's
delay of the pair and how many messages it has had. So no draw depends on what other pairs do.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from decentral.fleet import Fleet
from decentral.fleet.links import Route
from decentral.fleet.sites import Range, line_of
from decentral.replica import seed_of
from decentral.sim.loss import mathis_bps, timeouts_s, times_sent
from decentral.sim.network import Terms

DAY_S = 86_400.0
DIP_STEP_S = 900.0
"""How long a capacity that changes with the hour stays the same."""

LEAST_RTT_S = 1e-4
"""Below it hosts, not distance, make the round trip; weights of shorter ones would grow without bound."""

NORMAL = NormalDist()


class Links:
    """What a fleet's workers meet on their way to each other; `options` are for `Network`.

    `up_bps` and `down_bps` are what the workers' lines carry besides headers, in bits per second.
    """

    def __init__(self, fleet: Fleet, seed: int, now: Callable[[], float]) -> None:
        """Resolve a checked fleet; `now` returns the virtual time in seconds. Raises `ConfigError`."""
        self._seed = seed
        self._now = now
        self._network = fleet.network
        groups, sites = fleet.each(), fleet.sites()
        places = list(dict.fromkeys(sites))
        routes = fleet.network.routes(places, fleet.latency_s)
        payload = 1.0 - fleet.network.overhead
        self._routes = [
            [replace(route, bps=route.bps * payload) for route in (routes[one, other] for other in places)]
            for one in places
        ]
        self._place = [places.index(site) for site in sites]
        lines = [line_of(site) for site in sites]
        up, down = (fleet.up_bps, fleet.up_bps), (fleet.down_bps, fleet.down_bps)
        self.up_bps = [
            payload * (group.up_bps or self._draw(line.up_bps if line else up, "uplink", worker))
            for worker, (group, line) in enumerate(zip(groups, lines, strict=True))
        ]
        self.down_bps = [
            payload * (group.down_bps or self._draw(line.down_bps if line else down, "downlink", worker))
            for worker, (group, line) in enumerate(zip(groups, lines, strict=True))
        ]
        self._access_s = [
            self._draw(line.access_s, "access", worker) if line else 0.0 for worker, line in enumerate(lines)
        ]
        self._sides = [partition.sides(sites) for partition in fleet.network.partitions]
        self._turns = sorted({at_s for each in fleet.network.partitions for at_s in (each.from_s, each.until_s)})
        self._dips = any(route.daily_dip for route in routes.values())
        self._messages: defaultdict[tuple[int, int], int] = defaultdict(int)

    def options(self) -> dict[str, Any]:
        """Return the arguments of `Network` after its loop, without those that this fleet does not need."""
        routes = [route for row in self._routes for route in row]
        options: dict[str, Any] = {"up_bps": self.up_bps, "down_bps": self.down_bps, "latency_s": self.latency_s}
        if len(routes) == 1 and not (routes[0].jitter_s or routes[0].loss or any(self._access_s)):
            latency_s = routes[0].latency_s
            options["latency_s"] = lambda _source, _to: latency_s
        changes = self._dips or bool(self._turns)
        if changes or any(route.bps < math.inf for route in routes):
            options["pair_bps"] = self.pair_bps
        if changes:
            options["next_change"] = self.next_change
        network = self._network
        if network.window_bytes or network.sharing != "fair" or any(route.loss for route in routes):
            options["terms"] = self.terms
        return options

    @property
    def steady(self) -> bool:
        """Whether all messages of a pair are equally long on their way."""
        return not any(route.jitter_s or route.loss for row in self._routes for route in row)

    def latency_s(self, source: int, to: int) -> float:
        """Return how long the next message of a pair is on its way, in seconds: drawn if it varies."""
        route, mean_s = self._route(source, to), self._mean_latency_s(source, to)
        if not (route.jitter_s or route.loss):
            return mean_s
        number = self._messages[source, to]
        self._messages[source, to] = number + 1
        latency_s = mean_s
        if route.jitter_s:
            # Log-normal of this mean and standard deviation: variance (exp(sigma^2) - 1) x mean^2.
            variance = math.log1p((route.jitter_s / mean_s) ** 2)
            normal = NORMAL.inv_cdf(self._chance("latency", source, to, number))
            latency_s = mean_s * math.exp(math.sqrt(variance) * normal - variance / 2)
        if route.loss:
            latency_s += timeouts_s(route.loss, self._rtt_s(source, to), self._chance("loss", source, to, number))
        return latency_s

    def pair_bps(self, source: int, to: int) -> float:
        """Return what a pair gets now, in bits per second, whatever its lines: 0 while it is parted."""
        now, route = self._now(), self._route(source, to)
        for partition, sides in zip(self._network.partitions, self._sides, strict=True):
            if partition.from_s <= now < partition.until_s and sides[source] + sides[to] == 3:
                return 0.0  # side 1 to side 2 or back
        if not route.daily_dip:
            return route.bps
        middle_s = (now // DIP_STEP_S + 0.5) * DIP_STEP_S
        depth = (1.0 + math.cos(2.0 * math.pi * (middle_s - route.busiest_at_s) / DAY_S)) / 2.0
        return route.bps * (1.0 - route.daily_dip * depth)

    def next_change(self, now: float) -> float:
        """Return when `pair_bps` next answers otherwise, in seconds; infinity if never."""
        index = bisect_right(self._turns, now)
        turn = self._turns[index] if index < len(self._turns) else math.inf
        return min(turn, (now // DIP_STEP_S + 1.0) * DIP_STEP_S) if self._dips else turn

    def terms(self, source: int, to: int) -> Terms:
        """Return what a flow of a pair gets at most, its weight and how often its bits are sent."""
        loss, rtt_s = self._route(source, to).loss, self._rtt_s(source, to)
        cap_bps = mathis_bps(loss, rtt_s)
        if self._network.window_bytes and rtt_s:
            cap_bps = min(cap_bps, 8.0 * self._network.window_bytes / rtt_s)
        weight = round(2**32 / max(rtt_s, LEAST_RTT_S)) if self._network.sharing == "rtt_weighted" else 1
        return Terms(cap_bps, weight, times_sent(loss))

    def _route(self, source: int, to: int) -> Route:
        return self._routes[self._place[source]][self._place[to]]

    def _mean_latency_s(self, source: int, to: int) -> float:
        return self._access_s[source] + self._route(source, to).latency_s + self._access_s[to]

    def _rtt_s(self, source: int, to: int) -> float:
        return self._mean_latency_s(source, to) + self._mean_latency_s(to, source)

    def _draw(self, span: Range, purpose: str, worker: int) -> float:
        """Return a worker's figure between two bounds, uniform in its logarithm."""
        low, high = span
        return low if low == high else low * (high / low) ** self._chance(purpose, worker)

    def _chance(self, *of: object) -> float:
        """Return a number in (0, 1), uniform over what it is of."""
        return ((seed_of(self._seed, *of) >> 11) + 0.5) / 2**52  # 52 bits: neither 0 nor, rounded, 1
