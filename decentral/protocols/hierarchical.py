"""Hierarchical DiLoCo: often among neighbours, seldom among all."""

from __future__ import annotations

import itertools

from pydantic import PositiveInt
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.collectives import exchange
from decentral.protocols.merge import Nesterov, OuterField, OuterSGD, mean
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Period
from decentral.protocols.topology import both_ways


class HierarchicalDiLoCo(AllReduceRule):
    """An outer step inside each region every H local steps, and one over all workers every R of these.

        region r:   anchor_r <- outer_r(anchor_r, mean over r (anchor_r - theta_i));   theta_i <- anchor_r
        all:        anchor <- outer(anchor, mean_i (anchor - theta_i));   theta_i, anchor_r <- anchor

    DiLoCo (arXiv 2311.08105) on two levels, synchronous on both; the two levels with outer momentum are those of HALoS
    (arXiv 2506.04531), which is asynchronous. Inside a region, where links are fast, updates go in float32 from each to
    each, and are taken by all or by none, like gossip: if a worker dies in between, a region may be apart until the
    next round of all, which ends with equal replicas. `codec`, `all_reduce` and `merge` are for the rounds of all.
    Regions count by their workers. One worker a region is DiLoCo with phases of R H steps.
    """

    name = "hierarchical"
    period: Period = Every(period=50)
    """Local steps between rounds inside a region (H)."""
    rounds: PositiveInt = 10
    """Rounds inside a region for each round of all (R); the last step is always followed by both."""
    regions: tuple[PositiveInt, ...] | None = None
    """Workers in each region, in the order of their numbers; unset: two halves."""
    region_outer: OuterField = OuterSGD()
    """Outer optimiser inside a region; its momentum starts at zero and is never exchanged between regions."""
    outer: OuterField = Nesterov()
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
        while await peer.train(self.period.steps(peer)):
            round_ = peer.next_round("region")
            own_mean = await self._region_mean(peer, own_anchor - peer.params, round_)
            if own_mean is not None:
                self.region_outer.step(own_anchor, own_mean, own_momentum)
                peer.params.copy_(own_anchor)
            if round_ % self.rounds and peer.steps_left:
                continue
            mean_of_all = await self.agreed_mean(peer, anchor - peer.params)
            if mean_of_all is not None:
                self.outer.step(anchor, mean_of_all, momentum)
                own_anchor.copy_(anchor)
                peer.params.copy_(anchor)

    async def _region_mean(self, peer: Peer, change: Tensor, round_: int) -> Tensor | None:
        """Return the mean of the region's changes `[P]`, the same bits for all of them; None if it failed."""
        others = [worker for worker in self._region(peer) if worker != peer.id and worker in peer.members]
        heard = await exchange(peer, both_ways(tuple(others)), change, Float32(), channel="region", round_=round_)
        if heard is None:
            return None
        heard[peer.id] = change
        return mean([heard[worker] for worker in sorted(heard)])

    def _region(self, peer: Peer) -> tuple[int, ...]:
        """Return the workers of the peer's region, ascending."""
        ids = peer.cohort.ids
        sizes = self.regions or (len(ids) - len(ids) // 2, len(ids) // 2)
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        return next(ids[start:stop] for start, stop in bounds if peer.id in ids[start:stop])
