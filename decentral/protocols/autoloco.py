"""AutoLoCo: DiLoCo whose phases grow, with an outer optimiser that follows them."""

from __future__ import annotations

from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Int8
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import EqualPeriod, Growing


class AutoLoCo(AllReduceRule):
    """DiLoCo whose phase length H follows the data processed; outer momentum and learning rate follow H.

        r = H / H_ref;   mu' = mu^r;   eta' = eta (1 - mu') / (1 - mu);   anchor <- outer'(anchor, mean_i Delta_i)

    arXiv 2609.36662 by its abstract alone: H is set by the data processed, momentum and learning rate are corrected
    when it changes, updates travel as int8. The law of growth (`Growing`) and the correction are ours: the outer
    optimiser remembers as many local steps, and moves as far for the same speed of the workers, whatever H is. With
    H = H_ref it is DiLoCo. The control for any gain of a schedule is `matched_random`, its phases in random order.
    """

    name = "autoloco"
    period: EqualPeriod = Growing()
    """Local steps between rounds (H)."""
    reference: int = Field(default=100, ge=1)
    """Phase length for which `outer` is given (H_ref), in local steps."""
    outer: Outer = Nesterov()
    """Outer optimiser at H_ref; its momentum starts at zero."""
    codec: Codec = Int8()
    """How updates travel."""

    def check(self, workers: int) -> None:
        """Refuse outer optimisers whose memory cannot be stretched."""
        super().check(workers)
        self.outer.stretched(1.0)

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")  # as outer gradients of H_ref steps would have left it
        spanned = 0
        while steps := await peer.train(self.period.steps(peer)):
            spanned += steps
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is not None:
                ratio, spanned = spanned / self.reference, 0
                outer = self.outer.stretched(ratio)
                scale = ratio * self.outer.lr / outer.lr
                outer.step(anchor, mean, momentum.mul_(scale))
                momentum.div_(scale)
                peer.params.copy_(anchor)
