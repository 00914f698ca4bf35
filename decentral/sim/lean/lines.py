"""Lines that flows share max-min fairly: the rates of `decentral.sim.network`, for flows that nobody cancels.

Most flows of gossip meet no other on either of their lines. Such a flow is one event, its arrival. Only one that meets
others gets an event when its last byte leaves as well, for then the others share what it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from decentral.sim.lean.agenda import Agenda
from decentral.sim.network.sharing import fill

NEVER = math.inf

Resource = tuple[str, int, int]
"""A worker's uplink or downlink, or what a pair of workers has."""


class Flow:
    """Bytes on their way from `source` to `to`; `round` and `verdict` say what they are."""

    __slots__ = (
        "alone",
        "arrives_at",
        "bits",
        "ends_at",
        "latency_s",
        "nbytes",
        "rate_bps",
        "rated_at",
        "round",
        "source",
        "to",
        "verdict",
    )

    def __init__(self, source: int, to: int, nbytes: int, round_: int, verdict: bool) -> None:
        self.source, self.to, self.nbytes = source, to, nbytes
        self.round, self.verdict = round_, verdict
        self.bits = 8.0 * nbytes  # what had not left at `rated_at`
        self.rate_bps = self.rated_at = 0.0
        self.latency_s = 0.0
        self.ends_at = NEVER  # when the last byte leaves, if nothing changes
        self.arrives_at = NEVER  # if that is known already
        self.alone = False


class Lines:
    """The up- and downlinks of workers, in bits per second. `arrived(flow)` is called when its last byte arrives.

    `latency_s(source, to)` is asked once for each flow and may draw; `pair_bps(source, to)` caps what a pair gets.
    """

    def __init__(
        self,
        agenda: Agenda,
        up_bps: Sequence[float],
        down_bps: Sequence[float],
        latency_s: Callable[[int, int], float],
        pair_bps: Callable[[int, int], float] | None,
        arrived: Callable[[Flow], object],
    ) -> None:
        self._agenda, self._arrived = agenda, arrived
        self._up_bps, self._down_bps = up_bps, down_bps
        self._latency_s, self._pair_bps = latency_s, pair_bps
        # Who sends over each line: several that share, or one alone, which is cleared away when the next one comes.
        self._up: list[list[Flow]] = [[] for _ in up_bps]
        self._down: list[list[Flow]] = [[] for _ in down_bps]

    def send(self, flow: Flow) -> None:
        """Begin to send a flow now."""
        now = flow.rated_at = self._agenda.now
        flow.latency_s = self._latency_s(flow.source, flow.to)
        up, down = self._up[flow.source], self._down[flow.to]
        for line in (up, down):
            if line and line[0].alone and line[0].ends_at <= now:
                line.clear()
            line.append(flow)
        if len(up) == len(down) == 1:
            self._go_alone(flow, self.capacity(flow.source, flow.to), now)
        else:
            self._share(flow, now)

    def capacity(self, source: int, to: int) -> float:
        """Return what a flow gets that meets nobody, in bits per second."""
        capacity = min(self._up_bps[source], self._down_bps[to])
        return capacity if self._pair_bps is None else min(capacity, self._pair_bps(source, to))

    def _go_alone(self, flow: Flow, rate_bps: float, now: float) -> None:
        self._set_rate(flow, rate_bps, now)
        flow.alone = True
        flow.arrives_at = flow.ends_at + flow.latency_s
        self._agenda.add(flow.arrives_at, self._arrive, flow)

    def _set_rate(self, flow: Flow, rate_bps: float, now: float) -> None:
        if flow.rated_at != now:
            flow.bits = max(0.0, flow.bits - flow.rate_bps * (now - flow.rated_at))
            flow.rated_at = now
        flow.rate_bps = rate_bps
        flow.ends_at = now + flow.bits / rate_bps

    def _share(self, flow: Flow, now: float) -> None:
        """Share the lines of all flows that are linked with this one, directly or through others."""
        up, down = self._up[flow.source], self._down[flow.to]
        if up == down:  # one path, shared by all
            rates = dict.fromkeys(up, self.capacity(flow.source, flow.to) / len(up))
        else:
            rates = self._max_min(flow, now)
        if len(rates) == 1:
            if rates[flow] != flow.rate_bps:
                self._go_alone(flow, rates[flow], now)
            return
        for each, rate_bps in rates.items():
            if rate_bps != each.rate_bps:
                self._set_rate(each, rate_bps, now)
            elif not each.alone:
                continue
            each.alone, each.arrives_at = False, NEVER
            self._agenda.add_early(each.ends_at, self._finish, each)

    def _max_min(self, flow: Flow, now: float) -> dict[Flow, float]:
        """Return the rates of a flow and of all that are linked with it."""
        flows = [flow]
        known = {flow}
        users: dict[Resource, list[int]] = {}
        paths: dict[int, list[Resource]] = {}
        capacity: dict[Resource, float] = {}
        for number, each in enumerate(flows):  # grows while we walk it
            path = {("up", each.source, 0): self._up_bps[each.source], ("down", 0, each.to): self._down_bps[each.to]}
            if self._pair_bps is not None:
                path["pair", each.source, each.to] = self._pair_bps(each.source, each.to)
            paths[number] = list(path)
            capacity.update(path)
            for resource, line in zip(path, (self._up[each.source], self._down[each.to], ()), strict=False):
                if resource not in users:
                    users[resource] = []
                    new = [other for other in line if other.ends_at > now and other not in known]
                    known.update(new)
                    flows.extend(new)
                users[resource].append(number)
        rates = fill(paths, users, users, capacity)
        return {each: rates[number] for number, each in enumerate(flows)}

    def _finish(self, flow: Flow) -> None:
        """The last byte of a flow that had met others has left, unless its rate has changed since that was foreseen."""
        now = self._agenda.now
        if flow.alone or flow.ends_at != now or flow.arrives_at < NEVER:
            return
        flow.arrives_at = now + flow.latency_s
        self._agenda.add(flow.arrives_at, self._arrive, flow)
        up, down = self._up[flow.source], self._down[flow.to]
        for line in (up, down):
            line[:] = [other for other in line if other.ends_at > now]
        if up:
            self._share(up[0], now)
        if down and (not up or down[0] is not up[0]):
            self._share(down[0], now)

    def _arrive(self, flow: Flow) -> None:
        """The last byte of a flow arrives, unless its rate has changed since that was foreseen."""
        if flow.arrives_at == self._agenda.now:
            flow.arrives_at = NEVER
            self._arrived(flow)
