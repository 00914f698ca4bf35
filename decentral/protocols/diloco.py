"""DiLoCo: an outer optimiser on the mean change of many local steps."""

from __future__ import annotations

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.collectives import FOLDING
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.reductions import Reductions
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class DiLoCo(AllReduceRule):
    """Every H local steps an outer optimiser steps on the mean outer gradient of all workers.

        theta_i <- anchor;   H local steps;   Delta_i = anchor - theta_i;   anchor <- outer(anchor, sum_i w_i Delta_i)

    Douillard et al., arXiv 2311.08105, algorithm 1 and table 5 (outer Nesterov 0.7 / 0.9, H = 500). Inner optimiser
    states stay with their worker and are never reset. If a round is skipped a worker goes on from its own parameters
    and its next Delta spans both phases; the momentum does not decay. Weights are equal unless `weighted`.
    """

    name = "diloco"
    period: Schedule = Every(period=500)
    """Local steps between rounds (H)."""
    outer: Outer = Nesterov()
    """Outer optimiser; its momentum starts at zero."""
    weighted: bool = False
    """Weigh a worker's outer gradient by the samples it has trained on since the last round that was not skipped (w_i).

    The paper weighs by the size of the workers' shards where they differ. Where a worker says how much it counts, one
    that lies counts as much as it likes.
    """

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.weighted and (self.merge.robust or self.codec.same_participants or self.all_reduce not in FOLDING):
            what = f"all_reduce '{self.all_reduce}'"
            if self.codec.same_participants:
                what = f"codec '{type(self.codec).name}'"
            elif self.merge.robust:
                what = f"merge '{self.merge.spelling()}'"
            raise ConfigError(
                f"rule.weighted: {what} lets all workers count alike; set weighted to false, or take merge 'mean' with "
                "all_reduce 'butterfly' or 'gather'"
            )

    def reductions(self) -> Reductions | None:
        """Weights are in the headers, whose lengths they change."""
        return None if self.weighted else Reductions(self.period, self.codec, self.all_reduce, slots=2)

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")
        counted = peer.samples
        while await peer.train(self.period.steps(peer)):
            weight = max(1, peer.samples - counted) if self.weighted else 1
            mean = await self.agreed_mean(peer, anchor - peer.params, weight)
            if mean is not None:
                counted = peer.samples
                self.outer.step(anchor, mean, momentum)
                peer.params.copy_(anchor)
            del mean  # its memory is the next round's
