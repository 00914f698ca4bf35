"""Factored Gossip DiLoCo: parameters are mixed while the workers train, outer gradients when they have."""

from __future__ import annotations

from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import conclude, exchange, offer, require_dense
from decentral.protocols.merge import pull
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import RandomGroups, Topology, require_two
from decentral.wire import Tag


class FactoredGossip(SyncRule):
    """DiLoCo whose all-reduce is two gossips: W1 on the anchors, hidden behind the local steps, W2 on outer gradients.

        Delta_i = anchor_i - theta_i after H local steps from anchor_i
        anchor_i <- outer(sum_j W1_ij anchor_j, sum_j W2_ij Delta_j);   theta_i <- anchor_i

    Factored Gossip DiLoCo, arXiv 2606.22768, from a summary of the paper. The local phase starts from the anchor as it
    was before W1, so nothing waits for W1 and nothing in it is stale; W2 is waited for. Each worker has an outer
    momentum of its own. With both topologies "all" it is DiLoCo.
    """

    name = "factored_gossip"
    rests = True
    period: Schedule = Every(period=100)
    """Local steps between rounds (H)."""
    parameters: Topology = RandomGroups()
    """With whom anchors are mixed (W1)."""
    gradients: Topology = RandomGroups()
    """With whom outer gradients are mixed (W2)."""
    outer: Outer = Nesterov()
    """Outer optimiser."""
    codec: Codec = Float32()
    """How anchors and outer gradients travel."""

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)
        self.parameters.check(workers)
        self.gradients.check(workers)

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")
        while True:
            round_ = peer.next_round("parameters")
            links = self.parameters.links(peer, 2 * round_)  # even here and odd below: other groups for W2
            sent = self.codec.round_trip(anchor)
            if peer.steps_left:
                offer(peer, links, anchor, self.codec, Tag("parameters", round_, "x"))
            if not await peer.train(self.period.steps(peer)):
                return
            gradient = anchor - peer.params
            links = self.parameters.links(peer, 2 * round_)
            mixed = await conclude(peer, links, ("x",), anchor, self.codec, channel="parameters", round_=round_)
            if mixed:
                pull(anchor, sent, mixed[0], self.parameters.weights(peer, links))
            links = self.gradients.links(peer, 2 * round_ + 1)
            own = self.codec.round_trip(gradient)
            others = await exchange(peer, links, gradient, self.codec, channel="gradients", round_=round_)
            if others:
                pull(gradient, own, others, self.gradients.weights(peer, links))
            self.outer.step(anchor, gradient, momentum)
            peer.params.copy_(anchor)
