"""CO2: the round of one phase travels while the next phase trains."""

from __future__ import annotations

import asyncio

from pydantic import Field
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.merge import length
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule

Flight = asyncio.Task[list[Tensor] | None]
"""A round that settles in the background."""


class CO2(AllReduceRule):
    """Every H local steps an outer momentum takes in the outer gradient of the phase before, which has come meanwhile.

        m <- clip(beta m + Delta_(t-1) / Lambda_t, phi);   x_(t+1) = x_t - alpha m;   theta_i <- x_(t+1)
        Delta_t = x_t - mean_i theta_i at the end of phase t;   Lambda_t = max(1, |x_t - x_(t-1)| / |Delta_(t-1)|)

    Sun et al., arXiv 2401.16265, from memory of the paper: m is zero when the first phase ends, and the outer gradient
    in flight when training ends is still taken in. The normalisation of the staleness gap Lambda could not be checked
    against it; the one here penalises an outer gradient as far as the start has moved on by more than its length. The
    published code computes no Lambda, and its clipping has no effect. What a skipped round did not deliver is
    contributed again with the next. Without overlap nothing is stale, and it is DiLoCo with heavy-ball momentum.
    """

    name = "co2"
    newcomers = "none"
    rests = False
    period: Schedule = Every(period=48)
    """Local steps between rounds (tau)."""
    alpha: float = Field(default=1.0, gt=0)
    """Outer learning rate."""
    beta: float = Field(default=0.0, ge=0, lt=1)
    """Outer momentum. The code takes 0 up to 16 workers, 0.2 up to 32, 0.5 up to 64, and 0.6 beyond."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest absolute value of a coordinate of the momentum (phi); unset: none is cut."""
    overlap: bool = True
    """Let a round travel during the next phase; otherwise wait for it."""

    async def run(self, peer: Peer) -> None:
        anchor, begun = peer.slot("anchor", peer.params), peer.slot("begun", peer.params)
        sent = peer.slot("sent")
        flight: Flight | None = None
        while await peer.train(self.period.steps(peer)):
            change, start = anchor - peer.params, anchor.clone()
            if flight is not None:
                await self._land(peer, flight)
            sent.add_(change)  # to zero, or to what a skipped round did not deliver
            begun.copy_(start)
            flight = self.launch(peer, sent)
            if not self.overlap:
                await self._land(peer, flight)
                flight = None
            peer.params.copy_(anchor)
        if flight is not None:
            await self._land(peer, flight)
            peer.params.copy_(anchor)

    async def _land(self, peer: Peer, flight: Flight) -> None:
        """Take the outer gradient in flight into the anchor; one that does not arrive stays in `sent`."""
        means = await flight
        if means is None:
            return
        anchor, momentum = peer.slot("anchor"), peer.slot("momentum")
        momentum.mul_(self.beta).add_(means[0], alpha=1 / staleness(anchor, peer.slot("begun"), means[0]))
        if self.clip is not None:
            momentum.clamp_(-self.clip, self.clip)
        anchor.sub_(momentum, alpha=self.alpha)
        peer.slot("sent").zero_()


def staleness(now: Tensor, then: Tensor, change: Tensor) -> float:
    """Return the staleness gap max(1, |now - then| / |change|) of a change that was made from `then`, all `[n]`."""
    changed = length(change)
    return max(1.0, length(now - then) / changed) if changed else 1.0
