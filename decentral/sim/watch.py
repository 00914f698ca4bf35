"""A network that is watched: the most that each link carries, and what becomes of every pair's bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from decentral.errors import VerificationError
from decentral.sim.network import Flow, FlowState, Network
from decentral.traffic import PairBytes, Traffic


@dataclass(frozen=True, slots=True)
class Watch:
    """How closely a simulation is looked at. None of it changes what happens, only what is known of it afterwards."""

    links: bool = False
    """Keep the most that each link carries, and every pair's bytes."""
    checks: bool = False
    """The same, and after every allocation see that no link carries more than it can."""
    spans: bool = False
    """Journal what each worker did when, and its accounts every second (`Spent` and `Metered` records)."""

    def network(self, sites: Sequence[str | None], *args: Any, **options: Any) -> Network:
        """Return a network whose node i stands at `sites[i]`, watched if need be."""
        if self.links or self.checks:
            return WatchedNetwork(*args, sites=sites, checks=self.checks, **options)
        return Network(*args, **options)


UNWATCHED = Watch()


class SiteTally:
    """Bytes that workers hand in for other sites than their own: `nbytes[worker][site]`."""

    def __init__(self, sites: Sequence[str | None]) -> None:
        self._sites = sites
        self.several = len(set(sites)) > 1
        self.nbytes: dict[int, dict[str | None, int]] = {}

    def sent(self, source: int, target: int, nbytes: int) -> None:
        """Count a message."""
        site = self._sites[target]
        if site != self._sites[source]:
            by_site = self.nbytes.setdefault(source, {})
            by_site[site] = by_site.get(site, 0) + nbytes


class Load:
    """What a link carries now, and the most that it has carried at the end of an allocation, in bits per second."""

    __slots__ = ("_flows", "bps", "peak_bps")

    def __init__(self) -> None:
        self._flows = 0
        self.bps = 0.0
        self.peak_bps = 0.0

    def change(self, before_bps: float, after_bps: float) -> None:
        """A flow across the link goes on at another rate; 0 is none."""
        self._flows += (after_bps > 0.0) - (before_bps > 0.0)
        # An idle link carries nothing at all, whatever the sum of many roundings says.
        self.bps = self.bps + (after_bps - before_bps) if self._flows else 0.0


class WatchedNetwork(Network):
    """A network that carries what `Network` would, when it would, and keeps the pairs and the peaks of a `Traffic`.

    That costs a few sums for each flow whose rate changes. With `checks` every link is looked at after every
    allocation: `VerificationError` if one carries more than its capacity.
    """

    def __init__(self, *args: Any, sites: Sequence[str | None], checks: bool = False, **options: Any) -> None:
        """Build a network whose node i stands at `sites[i]`; the other arguments are those of `Network`."""
        super().__init__(*args, **options)
        self._sites = sites
        self._checks = checks
        self._up = [Load() for _ in sites]
        self._down = [Load() for _ in sites]
        self._between: defaultdict[tuple[str | None, str | None], Load] = defaultdict(Load)
        self._changed: dict[Load, None] = {}  # since the last allocation
        self._pairs: defaultdict[tuple[int, int], PairBytes] = defaultdict(PairBytes)

    def report(self, traffic: Traffic) -> None:
        """Fill in what this network has seen so far."""
        traffic.pairs = dict(self._pairs)
        traffic.up_peak_bps = [load.peak_bps for load in self._up]
        traffic.down_peak_bps = [load.peak_bps for load in self._down]
        traffic.site_peak_bps = {sites: load.peak_bps for sites, load in self._between.items()}

    def transfer(
        self,
        src: int,
        dst: int,
        nbytes: int,
        done: Callable[[Flow], object],
        on_sent: Callable[[Flow], object] | None = None,
    ) -> Flow:
        flow = super().transfer(src, dst, nbytes, done, on_sent)
        self._pairs[src, dst].sent += nbytes
        return flow

    def cancel(self, flow: Flow) -> None:
        over = (FlowState.DONE, FlowState.CANCELLED)
        if flow.state not in over:
            self._pairs[flow.src, flow.dst].lost += flow.nbytes
        super().cancel(flow)

    def _arrive(self, flow: Flow) -> None:
        self._pairs[flow.src, flow.dst].received += flow.nbytes
        super()._arrive(flow)

    def _set_rate(self, flow: Flow, rate_bps: float, now: float) -> None:
        self._note(flow, rate_bps)
        super()._set_rate(flow, rate_bps, now)

    def _detach(self, flow: Flow) -> None:
        self._note(flow, 0.0)
        super()._detach(flow)

    def _allocate(self) -> None:
        super()._allocate()
        for load in self._changed:
            load.peak_bps = max(load.peak_bps, load.bps)
        self._changed.clear()
        if self._checks:
            try:
                self.verify()
            except AssertionError as error:
                raise VerificationError(f"network at {self._loop.now} s: {error}") from error

    def _note(self, flow: Flow, rate_bps: float) -> None:
        loads = [self._up[flow.src], self._down[flow.dst]]
        source, target = self._sites[flow.src], self._sites[flow.dst]
        if source != target:
            loads.append(self._between[source, target])
        for load in loads:
            load.change(flow.rate_bps, rate_bps)
            self._changed[load] = None
