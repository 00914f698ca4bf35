"""How fast a worker's bytes may go: over the link that is emulated for it, and beside its training."""

from __future__ import annotations

import asyncio

SLICE_S = 0.005
"""Seconds of an emulated link's time that one chunk takes at most: packets share a link chunk by chunk."""
SMALLEST_CHUNK = 1 << 14
LEEWAY_S = 0.05
"""A packet that was held up for so long, by a late wake-up or by the other side, catches up at full speed."""
SHORTEST_SLEEP_S = 0.001
"""What would be a shorter wait is added to the next one: the event loop cannot sleep so briefly."""


class TokenBucket:
    """Lets `bits_per_s` pass, shared by all packets in the order in which their chunks come.

    Idle time is not saved up: a packet takes size / rate on an empty link, however long it has been empty.
    """

    def __init__(self, bits_per_s: float) -> None:
        self.bytes_per_s = bits_per_s / 8
        self._through_at = 0.0  # when all that was let pass will be through, by the loop's clock

    async def take(self, nbytes: int, since: float) -> None:
        """Wait until so many bytes more of a packet that began at `since`, by the loop's clock, are through."""
        now = asyncio.get_running_loop().time()
        self._through_at = max(self._through_at, since, now - LEEWAY_S) + nbytes / self.bytes_per_s
        wait = self._through_at - now
        if wait > SHORTEST_SLEEP_S:
            await asyncio.sleep(wait)


class Pace:
    """The pace of one worker's transport. By default nothing is held up.

    `up_bps` and `down_bps` (bits per second) and `latency_s` (seconds, one way) emulate the worker's link. While the
    worker is `training`, either direction is held to `training_bps`, so that streams do not starve it.
    """

    def __init__(
        self,
        *,
        up_bps: float | None = None,
        down_bps: float | None = None,
        latency_s: float = 0.0,
        training_bps: float | None = None,
    ) -> None:
        self._up, self._down = _bucket(up_bps), _bucket(down_bps)
        self._beside = _bucket(training_bps), _bucket(training_bps)
        self.latency_s = latency_s
        self.training = False

    def sending(self, *, makes_way: bool = True) -> Flow:
        """Return the flow of a packet that begins to leave now, and `makes_way` for training or does not."""
        return Flow(self, self._up, self._beside[0] if makes_way else None)

    def receiving(self) -> Flow:
        """Return the flow of a packet that begins to arrive now."""
        return Flow(self, self._down, self._beside[1])

    def chunk_bytes(self, most: int) -> int:
        """Return how many bytes to send at once, at most `most`."""
        if self._up is None:
            return most
        return max(SMALLEST_CHUNK, int(min(most, self._up.bytes_per_s * SLICE_S)))


class Flow:
    """One packet on its way in or out."""

    __slots__ = ("_beside", "_link", "_pace", "_since")

    def __init__(self, pace: Pace, link: TokenBucket | None, beside: TokenBucket | None) -> None:
        self._pace, self._link, self._beside = pace, link, beside
        self._since = asyncio.get_running_loop().time()

    async def take(self, nbytes: int) -> None:
        """Wait until so many bytes more of the packet may pass."""
        if self._link is not None:
            await self._link.take(nbytes, self._since)
        if self._beside is not None and self._pace.training:
            await self._beside.take(nbytes, self._since)


def _bucket(bits_per_s: float | None) -> TokenBucket | None:
    return None if bits_per_s is None else TokenBucket(bits_per_s)
