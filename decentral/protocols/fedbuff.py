"""FedBuff: an asynchronous server that steps when its buffer of pushes is full."""

from __future__ import annotations

from pydantic import Field

from decentral.protocols.async_local_sgd import AsyncRule
from decentral.protocols.outer import Outer, OuterSGD
from decentral.protocols.server import Server


class FedBuff(AsyncRule):
    """The server adds pushes up, the staler the less, and takes an outer step on every K of them.

        Delta <- Delta + (1 + s_i)^-a g_i / K;   every K-th push:  model <- outer(model, Delta);   Delta <- 0

    Nguyen et al., arXiv 2106.06581, algorithm 1, from memory of the paper; s is the updates between the model that the
    worker began with and now. The outer optimiser may heed the mean s of its K pushes (`adaptive_braking`). With
    momentum it is the "buffer" baseline of arXiv 2401.09135. With K the workers, equal speeds and a grace that covers
    the transfers it is local SGD. What is in the buffer when the run ends is lost.
    """

    name = "fedbuff"
    buffer: int = Field(default=10, ge=1)
    """Pushes that make an update (K)."""
    discount: float = Field(default=0.5, ge=0)
    """How fast a stale push loses weight (a)."""
    outer: Outer = OuterSGD()
    """Outer optimiser."""
    dylu: bool = False

    async def serve(self, server: Server) -> None:
        momentum, change = server.slot("momentum"), server.slot("pushed")
        outer = self.outer.fit([entry.stop - entry.start for entry in server.peer.layout.entries])
        buffered: list[tuple[int, int]] = []  # worker, staleness
        async for push in self.arrivals(server):
            change.add_(push.values, alpha=(1 + push.staleness) ** -self.discount / self.buffer)
            buffered.append((push.worker, push.staleness))
            if len(buffered) == self.buffer:
                staleness = sum(old for _, old in buffered) / self.buffer
                outer.delayed(staleness).step(server.model, change, momentum)
                server.updated([worker for worker, _ in buffered])
                change.zero_()
                buffered.clear()
