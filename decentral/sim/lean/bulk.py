"""Many flows at once: the rates of `decentral.sim.network`, and what becomes of all flows, in arrays.

An all-reduce among n workers is n x n flows at a time, of which thousands end together. Here what happens at one
instant costs a few passes over arrays, however many flows it happens to.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from decentral.sim.network.sharing import SAME_LEVEL

Array = np.ndarray[Any, np.dtype[Any]]


class Batch(NamedTuple):
    """Flows, one a row: who sends to whom, in bits and seconds; `kind` is the caller's."""

    source: Array
    to: Array
    kind: Array
    bits: Array
    """What had not left at `rated_at`."""
    latency_s: Array
    rate_bps: Array
    rated_at: Array
    ends_at: Array
    """When the last bit leaves, if nothing changes."""

    def where(self, mask: Array) -> Batch:
        """Return the rows for which `mask` is true."""
        return Batch(*(column[mask] for column in self))


NO_FLOWS = Batch(*(np.empty(0, np.int64) for _ in range(3)), *(np.empty(0) for _ in range(5)))


class Bulk:
    """Up- and downlinks in bits per second, and the flows on them; `pair_bps[source, to]` caps what a pair gets."""

    def __init__(self, up_bps: Array, down_bps: Array, pair_bps: Array | None) -> None:
        self._workers = len(up_bps)
        self._capped = pair_bps is not None
        pairs = [] if pair_bps is None else [pair_bps.ravel()]
        self._capacity = np.concatenate([up_bps, down_bps, *pairs]).astype(float)
        self._sending, self._changed = NO_FLOWS, False
        self._flying = NO_FLOWS
        self._arrives_at = np.empty(0)

    def send(self, source: Array, to: Array, kind: int, bits: Array, latency_s: Array, now: float) -> None:
        """Begin to send flows now."""
        rate_bps, rated_at, ends_at = (np.full(len(source), value) for value in (0.0, now, math.inf))
        kinds = np.full(len(source), kind)
        begun = Batch(source, to, kinds, bits, latency_s, rate_bps, rated_at, ends_at)
        self._sending = _joined(self._sending, begun)
        self._changed = True

    def next_arrival(self) -> float:
        """Return when a flow arrives next of those whose last bit has left, in virtual seconds."""
        return float(self._arrives_at.min(initial=math.inf))

    def share(self, now: float) -> float:
        """Share the lines anew if flows have come or gone; return when the last bit of one leaves next."""
        if self._changed:
            self._changed = False
            flows = self._sending
            rates = fill(self._paths(flows), self._capacity)
            new = rates != flows.rate_bps
            sent = flows.rate_bps[new] * (now - flows.rated_at[new])
            flows.bits[new] = np.maximum(0.0, flows.bits[new] - sent)
            flows.rate_bps[new], flows.rated_at[new] = rates[new], now
            flows.ends_at[new] = now + flows.bits[new] / rates[new]
        return float(self._sending.ends_at.min(initial=math.inf))

    def advance(self, now: float) -> Batch:
        """Let time pass up to now, the next thing to happen; return the flows that arrive."""
        over = self._sending.ends_at <= now
        if over.any():
            ended = self._sending.where(over)
            self._sending, self._changed = self._sending.where(~over), True
            self._flying = _joined(self._flying, ended)
            self._arrives_at = np.concatenate([self._arrives_at, now + ended.latency_s])
        here = self._arrives_at <= now
        arrived = self._flying.where(here)
        if here.any():
            self._flying, self._arrives_at = self._flying.where(~here), self._arrives_at[~here]
        return arrived

    def _paths(self, flows: Batch) -> list[Array]:
        """Return what the flows cross, by their places in the capacities."""
        pairs = [2 * self._workers + flows.source * self._workers + flows.to] if self._capped else []
        return [flows.source, self._workers + flows.to, *pairs]


def fill(paths: list[Array], capacity: Array) -> Array:
    """Return the max-min fair rates of flows, flow i crossing the resources `path[i]` of all `paths`.

    The filling of `decentral.sim.network.sharing`, in arrays.
    """
    left = np.arange(len(paths[0]))
    rates = np.full(len(left), math.inf)
    spare = capacity.copy()
    waiting = _count(paths, len(capacity))
    while len(left):
        levels = np.divide(spare, waiting, out=np.full(len(spare), math.inf), where=waiting > 0)
        level = levels.min()
        if level == math.inf:
            break
        full = levels <= level * SAME_LEVEL
        frozen = np.zeros(len(left), bool)
        for path in paths:
            frozen |= full[path[left]]
        rates[left[frozen]] = level
        freed = _count([path[left[frozen]] for path in paths], len(capacity))
        waiting -= freed
        spare -= level * freed
        left = left[~frozen]
    return rates


def _count(paths: list[Array], resources: int) -> Array:
    """Return how many flows cross each resource."""
    count = np.zeros(resources, np.int64)
    for path in paths:
        count += np.bincount(path, minlength=resources)
    return count


def _joined(one: Batch, other: Batch) -> Batch:
    return Batch(*(np.concatenate(columns) for columns in zip(one, other, strict=True))) if len(one.source) else other
