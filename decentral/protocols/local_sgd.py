"""Local SGD: average the parameters now and then."""

from __future__ import annotations

from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.reductions import Reductions
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class LocalSGD(AllReduceRule):
    """Every H local steps the parameters are averaged over all workers; inner optimiser states stay local.

        theta_i <- anchor;   H local steps;   anchor <- mean_i theta_i

    Stich, arXiv 1805.09767; federated averaging, McMahan et al., arXiv 1602.05629. What travels is the change since the
    last average (anchor - theta_i), which quantises far better than the parameters themselves.

    With `switch_step` it is post-local SGD, Lin et al., arXiv 1808.07217: an average after every step while the
    parameters still move fast, as data parallelism has it, and phases of H steps from then on.
    """

    name = "local_sgd"
    period: Schedule = Every(period=100)
    """Local steps between averages (H)."""
    switch_step: int = Field(default=0, ge=0)
    """Local step from which phases are H steps long; there is an average after every step before."""

    def reductions(self) -> Reductions | None:
        """Before `switch_step` phases are of another length than the period says."""
        return None if self.switch_step else Reductions(self.period, self.codec, self.all_reduce, slots=1)

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        while await peer.train(1 if peer.step < self.switch_step else self.period.steps(peer)):
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is not None:
                peer.params.copy_(anchor.sub_(mean))
