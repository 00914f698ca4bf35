"""Gossip: average the parameters with a few others, without any all-reduce."""

from __future__ import annotations

from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.codecs import Codec, CodecField, Float32
from decentral.protocols.collectives import exchange, require_dense
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Period
from decentral.protocols.topology import Links, RandomGroups, TopologyField, require_two


class Gossip(SyncRule):
    """Decentralised local SGD: every H local steps each worker mixes its parameters with those of its links.

        theta_i <- theta_i + sum_j w (C(theta_j) - C(theta_i)),   w = 1 / (1 + links of i)

    D-PSGD, Lian et al., arXiv 1705.09056. With two-way links of equal number the network's mean is kept, whatever the
    codec C loses; random pairs by default. Replicas stay different.
    """

    name = "gossip"
    period: Period = Every(period=50)
    """Local steps between exchanges (H)."""
    topology: TopologyField = RandomGroups()
    """Who talks to whom in a round."""
    codec: CodecField = Float32()
    """How parameters travel."""

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)

    async def run(self, peer: Peer) -> None:
        while await peer.train(self.period.steps(peer)):
            links = self.topology.links(peer, round_ := peer.next_round("pair"))
            await mix(peer, links, self.codec, round_)


async def mix(peer: Peer, links: Links, codec: Codec, round_: int) -> None:
    """Pull the parameters to the mean over the links, in place; nothing changes if the exchange fails."""
    others = await exchange(peer, links, peer.params, codec, round_=round_)
    if others:
        mine = codec.round_trip(peer.params)
        pulls: list[Tensor] = [theirs.sub_(mine) for theirs in others.values()]
        for pull in pulls:
            peer.params.add_(pull, alpha=1 / (1 + len(others)))
