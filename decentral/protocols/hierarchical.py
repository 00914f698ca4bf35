"""Hierarchical DiLoCo: often among neighbours, seldom among all."""

from __future__ import annotations

import itertools

from pydantic import PositiveInt

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.outer import Nesterov, Outer, OuterSGD
from decentral.protocols.rounds import AllReduceRule, Round
from decentral.protocols.schedule import EqualPeriod, Every


class HierarchicalDiLoCo(AllReduceRule):
    """An outer step inside each region every H local steps, and one over all workers every R of these.

        region r:   anchor_r <- outer_r(anchor_r, mean over r (anchor_r - theta_i));   theta_i <- anchor_r
        all:        anchor <- outer(anchor, mean_i (anchor - theta_i));   theta_i, anchor_r <- anchor

    DiLoCo (arXiv 2311.08105) on two levels, synchronous on both; the two levels with outer momentum are those of HALoS
    (arXiv 2506.04531), which is asynchronous. A region settles rounds of its own: whoever dies, its workers have the
    same anchor_r and momentum, and no other region notices. Its links are fast, so updates go in float32 by butterfly;
    `codec`, `all_reduce` and `merge` are for the rounds of all. Regions count by their workers. One worker a region is
    DiLoCo with phases of R H steps.
    """

    name = "hierarchical"
    newcomers = "none"
    period: EqualPeriod = Every(period=50)
    """Local steps between rounds inside a region (H)."""
    rounds: PositiveInt = 10
    """Rounds inside a region for each round of all (R); the last step is always followed by both."""
    regions: tuple[PositiveInt, ...] | None = None
    """Workers in each region, in the order of their numbers; unset: two halves."""
    region_outer: Outer = OuterSGD()
    """Outer optimiser inside a region; its momentum starts at zero and is never exchanged between regions."""
    outer: Outer = Nesterov()
    """Outer optimiser over all workers; its momentum starts at zero."""

    def check(self, workers: int) -> None:
        """Refuse regions that do not have all workers."""
        super().check(workers)
        if self.regions is not None and sum(self.regions) != workers:
            raise ConfigError(
                f"rule.regions: {list(self.regions)} are {sum(self.regions)} workers, the fleet has {workers}; "
                "every worker must be in one region"
            )

    async def run(self, peer: Peer) -> None:
        anchor, momentum = peer.slot("anchor", peer.params), peer.slot("momentum")
        own_anchor, own_momentum = peer.slot("region.anchor", peer.params), peer.slot("region.momentum")
        region = self._region(peer)
        while await peer.train(self.period.steps(peer)):
            round_ = Round(peer, Float32(), channel="region", group=region)
            round_.contribute(own_anchor - peer.params)
            means = await round_.settle()
            if means is not None:
                self.region_outer.step(own_anchor, means[0], own_momentum)
                peer.params.copy_(own_anchor)
            if round_.number % self.rounds and peer.steps_left:
                continue
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is not None:
                self.outer.step(anchor, mean, momentum)
                own_anchor.copy_(anchor)
                peer.params.copy_(anchor)

    def _region(self, peer: Peer) -> tuple[int, ...]:
        """Return the workers of the peer's region, ascending."""
        ids = peer.cohort.ids
        sizes = self.regions or (len(ids) - len(ids) // 2, len(ids) // 2)
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        return next(ids[start:stop] for start, stop in bounds if peer.id in ids[start:stop])
