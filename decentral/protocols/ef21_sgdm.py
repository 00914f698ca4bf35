"""EF21-SGDM: compressed data parallelism on running means of gradients."""

from __future__ import annotations

from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.codecs import EF21, Codec, TopK
from decentral.protocols.collectives import AllReduce
from decentral.protocols.rounds import AllReduceRule


class EF21SGDM(AllReduceRule):
    """Each worker averages its gradients over time; what the others know of that average is kept near it.

        v_i <- (1 - eta) v_i + eta grad_i;   c_i = C(v_i - g_i);   g_i <- g_i + c_i;   theta <- inner(theta, mean_i g_i)

    Fatkhullin et al., arXiv 2305.15155, from memory of the paper; v_i and the mirrors g_i (codec `ef21`) begin with the
    first gradient and with C of it. Plain EF21 (eta = 1, Richtarik et al., arXiv 2106.05203) never gets rid of the
    noise of gradients. With a C that leaves nothing out and eta = 1 it is gradient descent, the paper's step t being
    the update that follows gradient t. If a round is skipped its step goes by without a gradient for everybody.
    """

    name = "ef21_sgdm"
    needs_task = "it asks for gradients, and applies them itself"
    newcomers = "none"
    eta: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest gradient in the running mean."""
    codec: Codec = EF21(codec=TopK())
    """How running means travel."""
    all_reduce: AllReduce = "gather"

    async def run(self, peer: Peer) -> None:
        average = peer.slot("average")
        while peer.steps_left:
            async for _ in peer.backward([((0, peer.layout.size),)]):
                average.lerp_(peer.grads, self.eta if peer.step else 1.0)
            mean = await self.agreed_mean(peer, average)
            if mean is None:
                peer.grads.zero_()
            else:
                peer.grads.copy_(mean)
            await peer.apply_update()
