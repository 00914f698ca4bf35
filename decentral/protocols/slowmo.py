"""SlowMo: local SGD with a slow momentum over the averages."""

from __future__ import annotations

from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.reductions import Reductions
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class SlowMo(AllReduceRule):
    """Every H local steps the parameters are averaged, and the average is a step of heavy-ball momentum.

        u <- beta u + (anchor - mean_i theta_i) / gamma;   anchor <- anchor - alpha gamma u;   theta_i <- anchor

    Wang et al., arXiv 1910.00643, algorithm 1, with the defaults of fairscale's code; gamma is the inner learning rate,
    here that of the phase's last step. Dividing by gamma and multiplying by a later one lets old momentum shrink as the
    learning rate does; with a constant one it is DiLoCo with outer SGD of lr alpha and momentum beta. The inner
    optimiser's state stays with its worker. beta = 0 and alpha = 1 is local SGD.
    """

    name = "slowmo"
    period: Schedule = Every(period=48)
    """Local steps between averages (tau)."""
    alpha: float = Field(default=1.0, gt=0)
    """Slow learning rate."""
    beta: float = Field(default=0.5, ge=0, lt=1)
    """Slow momentum. The code advises 0 for less than 4 workers, 0.2 for 4, 0.5 for 8 and 0.6 from 16 on."""

    def reductions(self) -> Reductions:
        return Reductions(self.period, self.codec, self.all_reduce, slots=2)

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")
        while await peer.train(self.period.steps(peer)):
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is not None:
                gamma = peer.learning_rate(peer.step - 1)
                momentum.mul_(self.beta).add_(mean, alpha=1 / gamma)
                peer.params.copy_(anchor.sub_(momentum, alpha=self.alpha * gamma))
