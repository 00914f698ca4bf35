"""DeMo: data parallelism that sends the strongest frequencies of momenta, and steps by signs."""

from __future__ import annotations

import asyncio

import torch
from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import DCT, Codec, Float32, Wrapper
from decentral.protocols.codecs.bits import pack_bits, packed_bytes, unpack_bits
from decentral.protocols.codecs.sparse import Sparse
from decentral.protocols.collectives import AllReduce
from decentral.protocols.rounds import AllReduceRule


class Sign(Codec):
    """A bit a value: C(x) = 1 for x >= 0, otherwise -1. For values of which the direction alone counts."""

    def wire_bytes(self, numel: int) -> int:
        return packed_bytes(numel, 1)

    def pack(self, values: Tensor, payload: Tensor) -> None:
        pack_bits((values >= 0).to(torch.uint8), 1, payload)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        values.copy_(unpack_bits(payload, 1, values.numel())).mul_(2).sub_(1)


class DeMo(AllReduceRule):
    """Each worker accumulates gradients, sends the strongest frequencies of the sum, and forgets what it has sent.

        m_i <- beta m_i + lr grad_i;   q_i = C(m_i);   m_i <- m_i - q_i;   theta <- theta - lr sign(mean_i q_i)

    Peng et al., arXiv 2411.19870, as in its code: C keeps 32 coefficients of each tile of 64 x 64 (codec `dct_topk`).
    Its mean over those who sent a coefficient has the signs of this mean over all. With values coded coarsely (`Sign`)
    m_i loses what was kept of it, exactly. The step is the inner optimiser's on the signs: take plain SGD, with
    weight_decay if wanted. If a round is skipped nothing is forgotten and its step goes by.
    """

    name = "demo"
    needs_task = "it asks for gradients, and applies them itself"
    common_steps = True
    decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the accumulated gradients (beta)."""
    codec: Codec = DCT()
    """What travels of them."""
    all_reduce: AllReduce = "gather"

    def check(self, workers: int) -> None:
        super().check(workers)
        if isinstance(self.codec, Wrapper) or type(self.codec).coder is not Codec.coder:
            raise ConfigError(
                f"rule.codec: '{self.codec.spelling()}' remembers what it left out, and '{self.name}' does so itself; "
                "take 'dct_topk' or 'topk'"
            )

    async def run(self, peer: Peer) -> None:
        momentum = peer.slot("momentum")
        while peer.steps_left:
            async for _ in peer.backward([((0, peer.layout.size),)]):
                momentum.mul_(self.decay).add_(peer.grads, alpha=peer.learning_rate(peer.step))
            mean = await self.agreed_mean(peer, momentum)
            if mean is None:
                peer.grads.zero_()
            else:
                momentum.sub_(self.kept(peer, momentum))
                peer.grads.copy_(mean.sign())
            await peer.apply_update()

    def kept(self, peer: Peer, values: Tensor) -> Tensor:
        """Return what the codec keeps of `values` `[P]`, before it rounds that."""
        codec = self.codec.fit(peer.layout.shapes(((0, peer.layout.size),)))
        if isinstance(codec, Sparse):
            codec = codec.model_copy(update={"values": Float32()})
        return codec.round_trip(values)


class Psyche(DeMo):
    """DeMo with a bit for each coefficient, overlapped by a step, as the Psyche network runs it.

        gradient t at theta - lr sign(m_i);   meanwhile round t - 1 comes to q;   m_i <- m_i - q_i,(t-1)
        theta <- theta - lr sign(mean_i q_i,(t-1));   m_i <- beta m_i + lr grad_i;   send C(m_i)

    From the network's code (its run of 40B parameters: k = 4, beta 0.995, C with signs alone). The look ahead stands in
    for the update that the worker has not heard of. What a worker has sent leaves m_i when its round is confirmed.
    """

    name = "psyche"
    newcomers = "none"
    rests = False
    decay: float = Field(default=0.995, ge=0, lt=1)
    codec: Codec = DCT(k=4, values=Sign())

    async def run(self, peer: Peer) -> None:
        momentum, gradient = peer.slot("momentum"), peer.slot("gradient")
        offered, flight = peer.slot("offered"), None
        while peer.steps_left:
            lr, here = peer.learning_rate(peer.step), peer.params.clone()
            peer.params.sub_(momentum.sign(), alpha=lr)
            async for _ in peer.backward([((0, peer.layout.size),)]):
                gradient.copy_(peer.grads)
            peer.params.copy_(here)
            peer.grads.copy_(await self._signs(peer, flight, offered, momentum))
            await peer.apply_update()
            momentum.mul_(self.decay).add_(gradient, alpha=lr)
            flight = self.launch(peer, offered.copy_(momentum))
        peer.params.sub_(await self._signs(peer, flight, offered, momentum), alpha=peer.learning_rate(peer.step))

    async def _signs(
        self, peer: Peer, flight: asyncio.Task[list[Tensor] | None] | None, offered: Tensor, momentum: Tensor
    ) -> Tensor:
        """Return the signs that the round in flight came to, zeros if none; forget what was sent in it."""
        means = None if flight is None else await flight
        if means is None:
            return torch.zeros_like(momentum)
        momentum.sub_(self.kept(peer, offered))
        return means[0].sign()
