"""DiLoCo: an outer optimiser on the mean change of many local steps."""

from __future__ import annotations

from decentral.peer import Peer
from decentral.protocols.merge import Nesterov, OuterField
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Period


class DiLoCo(AllReduceRule):
    """Every H local steps an outer optimiser steps on the mean outer gradient of all workers.

        theta_i <- anchor;   H local steps;   Delta_i = anchor - theta_i;   anchor <- outer(anchor, mean_i Delta_i)

    Douillard et al., arXiv 2311.08105, algorithm 1 and table 5 (outer Nesterov 0.7 / 0.9, H = 500). Inner optimiser
    states stay with their worker and are never reset. If a round is skipped a worker goes on from its own parameters
    and its next Delta spans both phases.
    """

    name = "diloco"
    period: Period = Every(period=500)
    """Local steps between rounds (H)."""
    outer: OuterField = Nesterov()
    """Outer optimiser; its momentum starts at zero."""

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")
        while await peer.train(self.period.steps(peer)):
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is not None:
                self.outer.step(anchor, mean, momentum)
                peer.params.copy_(anchor)
