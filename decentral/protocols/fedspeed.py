"""FedSpeed: local SGD whose workers are held to the anchor, without a bias, and step by gradients of ground nearby."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.merge import length
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class FedSpeed(AllReduceRule):
    """H local steps with a proximal pull that is corrected by what it has held back so far (h_i, zero at first).

        g = grad_i(theta_i);   g' = grad_i(theta_i + rho g / |g|), on the same batch
        theta_i <- theta_i - lr (g' + lambda (theta_i - anchor + h_i))                        H times
        h_i <- h_i + theta_i - anchor;   anchor <- mean_i (theta_i + h_i);   theta_i <- anchor

    Sun et al., arXiv 2302.10429, from their simulator, which steps by g' alone; the paper mixes g and g' (from memory).
    The simulator's relaxed start, its falling learning rate and its clipping are not here: the last two are the inner
    optimiser's, which should be SGD. Where it stands still, lambda h_i = -grad_i and the h_i add up to zero: the anchor
    is a stationary point of the mean loss, however long the phases and however unequal the workers. A worker that dies
    takes its h_i along; in a skipped round h_i stays what it was. Every local step computes two gradients, and takes
    the time of two; rho = 0 saves the first.
    """

    name = "fedspeed"
    needs_task = "it asks for gradients, and applies them itself"
    newcomers = "none"
    period: Schedule = Every(period=50)
    """Local steps between rounds (H)."""
    strength: float = Field(default=0.1, ge=0)
    """Pull towards the anchor (lambda), a curvature: the gradient that it adds for each unit of distance."""
    radius: float = Field(default=0.1, ge=0)
    """How far uphill the second gradient is taken (rho), in units of the parameters."""

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        held = peer.slot("held")
        while peer.steps_left:
            for _ in range(min(self.period.steps(peer), peer.steps_left)):
                await self._step(peer, anchor, held)
            now_held = peer.params - anchor + held
            mean = await self.agreed_mean(peer, anchor - peer.params - now_held)
            if mean is not None:
                held.copy_(now_held)
                peer.params.copy_(anchor.sub_(mean))

    async def _step(self, peer: Peer, anchor: Tensor, held: Tensor) -> None:
        here = peer.params.clone()
        if self.radius:
            await self._gradient(peer)
            steepness = length(peer.grads)
            if steepness:
                peer.params.add_(peer.grads, alpha=self.radius / steepness)
        await self._gradient(peer)
        peer.params.copy_(here)
        peer.grads.add_(here.sub_(anchor).add_(held), alpha=self.strength)
        await peer.apply_update()

    async def _gradient(self, peer: Peer) -> None:
        async for _ in peer.backward([((0, peer.layout.size),)]):
            pass
