"""Local phases that begin and end with one layer after the other, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from decentral.peer import Gate, Peer
from decentral.replica import Spans
from decentral.sim.clock import VirtualLoop

FORWARD_SHARE = 1 / 3
"""The forward pass's share of a local step; the backward pass costs twice as much."""


class LayerwisePhases:
    """Layers are used in the order of the flat vector, become final in the reverse order, and take time by elements.

    The first forward pass stops at a gate until it opens; the last backward pass hands out a piece when it has passed
    its first element. How long the steps take is settled when they begin.
    """

    def __init__(self, loop: VirtualLoop, duration: Callable[[int, float], float]) -> None:
        """`duration(worker, steps)` returns the seconds that so many local steps take."""
        self._loop = loop
        self._duration = duration

    async def phase(
        self,
        peer: Peer,
        steps: int,
        pieces: Sequence[Spans],
        gates: Mapping[Spans, Gate],
        work: Callable[[], object],
    ) -> AsyncIterator[int]:
        """Run `work` when the last forward pass has ended; yield the pieces from the last layer to the first."""
        step_s = self._duration(peer.id, steps) / steps
        forward_s = FORWARD_SHARE * step_s / peer.layout.size  # an element
        backward_s = step_s / peer.layout.size - forward_s
        place = 0
        for spans in sorted(gates):
            first = spans[0][0]
            await self._loop.sleep((first - place) * forward_s)
            await gates[spans]()
            place = first
        peer.replica.expect_train(peer.step, steps)
        await self._loop.sleep((peer.layout.size - place) * forward_s + (steps - 1) * step_s)
        work()
        place = peer.layout.size
        for index in sorted(range(len(pieces)), key=lambda index: pieces[index], reverse=True):
            first = pieces[index][0][0]
            await self._loop.sleep((place - first) * backward_s)
            yield index
            place = first
        await self._loop.sleep(place * backward_s)
