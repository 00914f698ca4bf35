"""Single merge: sparse gossip while training, one complete average at the very end."""

from __future__ import annotations

from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.codecs import CodecField, Float32
from decentral.protocols.collectives import AllReduce, require_dense
from decentral.protocols.gossip import mix
from decentral.protocols.rounds import agreed_mean
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Period
from decentral.protocols.topology import RandomGroups, require_two


class SingleMerge(SyncRule):
    """Every H local steps a fraction R of the random pairs average; after the last step all workers average once.

        round t: pair (i, j) averages with probability R;     at the end: theta_i <- (1 / m) sum_k theta_k

    "On the surprising effectiveness of a single global merging", arXiv 2507.06542 (R = 0.2, H = 100). The paper's code
    pulls from one peer, which does not keep the network's mean; here pairs exchange.
    """

    name = "single_merge"
    period: Period = Every(period=100)
    """Local steps between rounds (H)."""
    rate: float = Field(default=0.2, ge=0, le=1)
    """Chance of a pair to average in a round (R)."""
    codec: CodecField = Float32()
    """How parameters travel in gossip; the merge itself is in float32."""
    all_reduce: AllReduce = "butterfly"

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)

    async def run(self, peer: Peer) -> None:
        topology = RandomGroups()
        while await peer.train(self.period.steps(peer)):
            links = topology.links(peer, round_ := peer.next_round("pair"))
            pair = min(peer.id, *links.to) if links.to else peer.id
            if peer.steps_left and peer.rng(f"single_merge {pair}", round_).random() < self.rate:
                await mix(peer, links, self.codec, round_)
        merged = await agreed_mean(peer, peer.params, Float32(), self.all_reduce)
        if merged is not None:
            peer.params.copy_(merged)
