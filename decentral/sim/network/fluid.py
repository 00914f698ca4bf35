"""A fluid network whose flows share bandwidth max-min fairly.

Every node has an uplink and a downlink, and an ordered pair of nodes may have a cap of its own. A flow from `src` to
`dst` crosses up(src), down(dst) and pair(src, dst), and at every moment the flows have the one allocation in which no
flow can be made faster without slowing a flow that is not faster: each flow crosses a full resource on which no other
flow is faster, its *bottleneck*. Nobody divides a size by a bandwidth here; what a burst costs follows from who else
sends at that time. With `terms` a flow may have a cap of its own, and a weight: "faster" is then in proportion to it.

An allocation changes only when a flow begins to send or ceases to, or a capacity changes, and then only within the
*component*: the flows linked with it, directly or through other flows, by shared resources of finite capacity. The
network gathers what one instant touches and allocates once, at the end of the instant. A flow whose rate stays the same
is left alone, so its time of completion is not recomputed and does not drift. A flow that meets no other, as most do in
gossip, is a component of its own: it gets the least of its capacities, and when it ends nobody is left to share anew.

Capacities may change: a node's line by `set_capacity`, pairs by themselves as `pair_bps` answers from then on. What
flows over them shares anew at the end of that instant. A capacity of 0 *stalls* its flows, as a cut cable stalls a TCP
connection: they keep what they have sent, go on when it heals, and who waits for them may lose patience before.

Nothing here iterates over a set or depends on the address of an object: flows go by their number, resources by theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain

from decentral.sim.clock import Handle, VirtualLoop
from decentral.sim.network.flow import NEVER, Flow, FlowState, Terms
from decentral.sim.network.sharing import fill

OVERFULL = 1.0 + 1e-9  # what `verify` lets rounding exceed a capacity by
STALE_ENTRIES_KEPT = 64  # below this a heap is not worth compacting


class Network:
    """Nodes 0 to n-1 that send each other bytes. Bandwidths in bits per second, latencies in seconds.

    `bytes_sent[node]` and `bytes_received[node]` count whole flows, when their last byte has left or arrived.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        *,
        up_bps: Sequence[float],
        down_bps: Sequence[float],
        latency_s: Callable[[int, int], float],
        pair_bps: Callable[[int, int], float] | None = None,
        next_change: Callable[[float], float] | None = None,
        terms: Callable[[int, int], Terms] | None = None,
    ) -> None:
        """Build a network of len(up_bps) nodes; infinity is no limit. Raises ValueError for a capacity not above 0.

        `latency_s(src, dst)` is asked once for each flow and may draw, `pair_bps(src, dst)` when a pair begins to talk.
        With `next_change(now)`, the time after `now` at which `pair_bps` next answers otherwise (infinity: never), it
        is asked again at that time, and may then say 0. `terms(src, dst)` are asked once for each flow.
        """
        if len(up_bps) != len(down_bps):
            raise ValueError(f"up_bps has {len(up_bps)} nodes and down_bps {len(down_bps)}; they must be the same")
        self._loop = loop
        self._nodes = len(up_bps)
        self._latency_s = latency_s
        self._pair_bps = pair_bps
        self._next_change = next_change
        self._change: Handle | None = None  # due when pairs change; only while flows send, so that a deadlock shows
        self._terms = terms
        self._weights: dict[int, int] | None = None if terms is None else {}  # of the flows that send
        # Resources are numbered up(0..n-1), down(0..n-1), pair(0,0), pair(0,1), ...; the cap of flow k alone is -k.
        # Only what is finite, or a pair that may become so, has a capacity.
        self._capacity: dict[int, float] = {}
        for resource, bandwidth_bps in enumerate([*up_bps, *down_bps]):
            self._limit(resource, bandwidth_bps)
        self._users: dict[int, dict[int, tuple[int, ...]]] = {}  # the paths of the flows that send across each resource
        self._sending: dict[int, Flow] = {}
        self._flows_of: list[dict[int, Flow]] = [{} for _ in range(self._nodes)]  # from or to a node, not yet arrived
        self._flows_made = 0
        self._touched: dict[int, None] = {}  # resources whose flows gained or lost company at this instant
        self._alone: list[Flow] = []  # flows that began at this instant and met nobody then
        self._finishes: list[tuple[float, int, Flow]] = []  # heap by time and number; stale unless the flow's own time
        self._wake: Handle | None = None  # due at the first completion
        self.bytes_sent = [0] * self._nodes
        self.bytes_received = [0] * self._nodes

    # What users call.

    def transfer(
        self,
        src: int,
        dst: int,
        nbytes: int,
        done: Callable[[Flow], object],
        on_sent: Callable[[Flow], object] | None = None,
    ) -> Flow:
        """Begin to send `nbytes` now; the loop calls `on_sent(flow)` when all have left, `done(flow)` when all arrived.

        Raises ValueError for nodes that do not exist or are the same, a negative size, or a latency that is negative
        or not finite.
        """
        if not (0 <= src < self._nodes and 0 <= dst < self._nodes and src != dst):
            raise ValueError(f"a flow goes between two different nodes of 0..{self._nodes - 1}, not {src} -> {dst}")
        if nbytes < 0:
            raise ValueError(f"a flow has 0 bytes or more, not {nbytes}")
        latency_s = self._latency_s(src, dst)
        if not 0.0 <= latency_s < math.inf:
            raise ValueError(f"the latency of {src} -> {dst} must be 0 s or more and finite, not {latency_s}")
        path = self._find_path(src, dst) if nbytes else ()
        self._flows_made = number = self._flows_made + 1
        flow = Flow(number, src, dst, nbytes, latency_s, self._loop.now, done, on_sent)
        if self._terms is not None and nbytes:
            path = self._apply(self._terms(src, dst), flow, path)
        self._flows_of[src][number] = flow
        self._flows_of[dst][number] = flow
        if path:
            self._attach(flow, path)
        else:
            self._finish_sending(flow, flow.started_at)
        return flow

    def cancel(self, flow: Flow) -> None:
        """Stop a flow: neither of its callbacks is called any more. Does nothing to one that has arrived."""
        if flow.state is FlowState.SENDING:
            self._settle(flow, self._loop.now)
            self._detach(flow)
        elif flow.state is FlowState.IN_FLIGHT and flow._arrival is not None:
            flow._arrival.cancel()
        else:
            return
        flow.state = FlowState.CANCELLED
        self._forget(flow)

    def cancel_node(self, node: int) -> list[Flow]:
        """Cancel every flow from or to a node, sending or in flight, and return them in the order of their start."""
        flows = list(self._flows_of[node].values())
        for flow in flows:
            self.cancel(flow)
        return flows

    def set_capacity(self, node: int, *, up_bps: float | None = None, down_bps: float | None = None) -> None:
        """Change a node's line from now on; 0 stalls what crosses it until the line is set again.

        Raises ValueError for a node that does not exist, a bandwidth that is negative or not finite, and a line that
        had no limit when the network was built.
        """
        if not 0 <= node < self._nodes:
            raise ValueError(f"nodes are numbered 0 to {self._nodes - 1}, not {node}")
        for resource, bandwidth_bps in ((node, up_bps), (self._nodes + node, down_bps)):
            if bandwidth_bps is None:
                continue
            if not 0.0 <= bandwidth_bps < math.inf:
                raise ValueError(
                    f"the bandwidth of {self._describe(resource)} must be 0 or more and finite, not {bandwidth_bps}"
                )
            if resource not in self._capacity:
                raise ValueError(f"{self._describe(resource)} has no limit that could change")
            self._change_to(resource, bandwidth_bps)

    def verify(self) -> None:
        """Raise AssertionError if at the end of this instant a resource carries more than its capacity."""
        first_pair = 2 * self._nodes
        for resource, users in self._users.items():
            rate_bps = math.fsum(self._sending[number].rate_bps for number in users)
            limit_bps = self._capacity[resource]
            if resource >= first_pair and self._pair_bps is not None:  # as it is now, not as we heard of it
                limit_bps = self._pair_bps(*divmod(resource - first_pair, self._nodes))
            if rate_bps > limit_bps * OVERFULL:
                raise AssertionError(f"{self._describe(resource)} carries {rate_bps} bit/s of {limit_bps} bit/s")

    # The life of a flow.

    def _finish_sending(self, flow: Flow, now: float) -> None:
        flow.sent_at = flow.rated_at = now
        flow.remaining_bits = 0.0  # by definition: the timer is the truth, what rounding left of the count is not
        flow.state = FlowState.IN_FLIGHT
        self.bytes_sent[flow.src] += flow.nbytes
        if flow._on_sent is not None:
            self._loop.call_soon(self._call_on_sent, flow)
        flow._arrival = self._loop.call_at(now + flow.latency_s, self._arrive, flow)

    def _call_on_sent(self, flow: Flow) -> None:
        if flow._on_sent is not None and flow.state is not FlowState.CANCELLED:
            flow._on_sent(flow)

    def _arrive(self, flow: Flow) -> None:
        flow.arrived_at = self._loop.now
        flow._arrival = None  # it refers to the flow: without the cycle both are freed at once
        flow.state = FlowState.DONE
        self.bytes_received[flow.dst] += flow.nbytes
        self._forget(flow)
        flow._done(flow)

    def _forget(self, flow: Flow) -> None:
        number = flow.number
        del self._flows_of[flow.src][number]
        del self._flows_of[flow.dst][number]

    # Resources.

    def _find_path(self, src: int, dst: int) -> tuple[int, ...]:
        capacity, down = self._capacity, self._nodes + dst
        if self._pair_bps is None:
            if src in capacity and down in capacity:
                return (src, down)
            return tuple([resource for resource in (src, down) if resource in capacity])
        pair = (2 + src) * self._nodes + dst
        if pair not in self._users:  # then it has no capacity either: millions of pairs may meet once each
            if self._next_change is None:
                self._limit(pair, self._pair_bps(src, dst))
            else:
                self._capacity[pair] = self._pair_bps(src, dst)  # without a limit too, as one may come
        return tuple([resource for resource in (src, down, pair) if resource in capacity])

    def _limit(self, resource: int, bandwidth_bps: float) -> None:
        if not bandwidth_bps > 0.0:
            raise ValueError(f"the bandwidth of {self._describe(resource)} must be above 0, not {bandwidth_bps}")
        if bandwidth_bps < math.inf:
            self._capacity[resource] = float(bandwidth_bps)

    def _apply(self, terms: Terms, flow: Flow, path: tuple[int, ...]) -> tuple[int, ...]:
        """Put a flow that is about to send under its terms and return its path, with the cap of its own."""
        flow.remaining_bits *= terms.times_sent
        if terms.cap_bps < math.inf:
            self._limit(-flow.number, terms.cap_bps)
            path = (*path, -flow.number)
        if path and self._weights is not None:
            self._weights[flow.number] = terms.weight
        return path

    def _change_to(self, resource: int, bandwidth_bps: float) -> None:
        """Give a resource another capacity; its flows, if any, share anew at the end of this instant."""
        if self._capacity[resource] == bandwidth_bps:
            return
        self._capacity[resource] = float(bandwidth_bps)
        if resource in self._users:
            if not self._touched and not self._alone:
                self._loop.at_instant_end(self._allocate)
            self._touched[resource] = None

    def _await_change(self) -> None:
        if self._next_change is not None:
            due = self._next_change(self._loop.now)
            if not due > self._loop.now:
                raise ValueError(f"the next change after {self._loop.now} s must be later, not at {due} s")
            if due < NEVER:
                self._change = self._loop.call_at(due, self._on_change)

    def _on_change(self) -> None:
        """Ask anew what the pairs carry that talk now."""
        self._change = None
        if self._pair_bps is not None:
            first = 2 * self._nodes
            for resource in [resource for resource in self._users if resource >= first]:
                self._change_to(resource, self._pair_bps(*divmod(resource - first, self._nodes)))
        if self._sending:
            self._await_change()

    def _describe(self, resource: int) -> str:
        if resource < 0:
            return f"flow {-resource}"
        kind, node = divmod(resource, self._nodes)
        if kind >= 2:
            return f"the pair {kind - 2} -> {node}"
        return f"the {'down' if kind else 'up'}link of node {node}"

    def _attach(self, flow: Flow, path: tuple[int, ...]) -> None:
        flow._path = path
        number = flow.number
        self._sending[number] = flow
        if self._change is None and self._next_change is not None:
            self._await_change()
        alone = True
        for resource in path:
            users = self._users.get(resource)
            if users is None:
                self._users[resource] = {number: path}
            else:
                users[number] = path
                alone = False
        if not self._touched and not self._alone:
            self._loop.at_instant_end(self._allocate)
        if alone:
            self._alone.append(flow)
        else:
            self._touched.update(dict.fromkeys(path))

    def _detach(self, flow: Flow) -> None:
        flow.rate_bps = 0.0
        flow._finish_at = NEVER  # its entries in the heap are stale from here on
        number = flow.number
        del self._sending[number]
        if self._weights is not None:
            del self._weights[number]
        for resource in flow._path:
            users = self._users[resource]
            del users[number]
            if users:
                if not self._touched and not self._alone:
                    self._loop.at_instant_end(self._allocate)
                self._touched[resource] = None
            else:
                del self._users[resource]
                if not 0 <= resource < 2 * self._nodes:
                    del self._capacity[resource]

    # Rates.

    def _allocate(self) -> None:
        """Share bandwidth anew in every component that this instant has touched."""
        now = self._loop.now
        touched, self._touched = self._touched, {}
        alone, self._alone = self._alone, []
        for flow in alone:
            if flow.state is FlowState.SENDING:
                self._set_rate_alone(flow, now)
        seen: set[int] = set()
        for resource in touched:
            if resource not in seen and resource in self._users:
                paths, resources = self._find_component(resource)
                seen.update(resources)
                self._share(paths, resources, now)
        self._set_wake()

    def _set_rate_alone(self, flow: Flow, now: float) -> None:
        """Give a flow all of its path, unless it has met others since it began: then they share what it crosses."""
        rate_bps = NEVER
        for resource in flow._path:
            if len(self._users[resource]) > 1:
                return
            rate_bps = min(rate_bps, self._capacity[resource])
        self._set_rate(flow, rate_bps, now)

    def _find_component(self, origin: int) -> tuple[dict[int, tuple[int, ...]], list[int]]:
        """Return the paths of the flows linked with `origin`, directly or through flows, and all their resources."""
        paths: dict[int, tuple[int, ...]] = {}
        reached = {origin}
        resources = [origin]
        for resource in resources:  # grows while we walk it
            users = self._users[resource]
            paths.update(users)
            for crossed in dict.fromkeys(chain.from_iterable(users.values())):
                if crossed not in reached:
                    reached.add(crossed)
                    resources.append(crossed)
        return paths, resources

    def _share(self, paths: Mapping[int, tuple[int, ...]], resources: list[int], now: float) -> None:
        if self._weights is None and all(len(self._users[resource]) == len(paths) for resource in resources):
            # One path shared by all.
            level = min([self._capacity[resource] for resource in resources]) / len(paths)
            rates = dict.fromkeys(paths, level)
        else:
            rates = fill(paths, resources, self._users, self._capacity, self._weights)
            if len(rates) < len(paths):  # some cross only what has no limit at present
                rates = {number: rates.get(number, NEVER) for number in paths}
        for number, rate_bps in rates.items():
            flow = self._sending[number]
            if rate_bps != flow.rate_bps:
                self._set_rate(flow, rate_bps, now)

    def _set_rate(self, flow: Flow, rate_bps: float, now: float) -> None:
        self._settle(flow, now)
        flow.rate_bps = rate_bps
        if rate_bps:
            flow._finish_at = now + flow.remaining_bits / rate_bps
            heappush(self._finishes, (flow._finish_at, flow.number, flow))
        else:
            flow._finish_at = NEVER

    def _settle(self, flow: Flow, now: float) -> None:
        """Take from the flow's bits those that have left since its rate was last changed."""
        if flow.rated_at != now:
            flow.remaining_bits = max(0.0, flow.remaining_bits - flow.rate_bps * (now - flow.rated_at))
            flow.rated_at = now

    # Completions.

    def _set_wake(self) -> None:
        """Set the timer to the first completion, which may have come nearer or gone."""
        finishes = self._finishes
        if len(finishes) > 2 * len(self._sending) + STALE_ENTRIES_KEPT:
            finishes[:] = [entry for entry in finishes if entry[2]._finish_at == entry[0]]
            heapify(finishes)
        while finishes and finishes[0][2]._finish_at != finishes[0][0]:
            heappop(finishes)
        finish_at = finishes[0][0] if finishes else NEVER
        if self._wake is not None:
            if self._wake.when() == finish_at:
                return
            self._wake.cancel()
        self._wake = self._loop.call_at(finish_at, self._on_wake) if finishes else None

    def _on_wake(self) -> None:
        """Finish all flows that are due; those due together finish in the order of their start."""
        self._wake = None
        now = self._loop.now
        while self._finishes and self._finishes[0][0] <= now:
            finish_at, _number, flow = heappop(self._finishes)
            if flow._finish_at == finish_at:
                self._detach(flow)
                self._finish_sending(flow, now)
        if not self._touched and not self._alone:  # otherwise the allocation will
            self._set_wake()
