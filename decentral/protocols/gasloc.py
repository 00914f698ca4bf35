"""GASLoC: gossip and an outer momentum in one step."""

from __future__ import annotations

from pydantic import Field

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import require_dense
from decentral.protocols.gossip import mix
from decentral.protocols.noloco import stability_bound
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import RandomGroups, Topology, require_two


class GASLoC(SyncRule):
    """Every H local steps each worker mixes where its drift leads with its links, and goes on in the same direction.

        y_t = theta_t + eta (theta_i after H local steps - theta_t)
        theta_t+1 = y_t - alpha sum_j w_ij (y_t - y_j,t) + gamma (y_t - y_t-1),   y_0 = theta_1

    Cagnasso, Belilovsky and Oyallon, arXiv 2606.11081, from a transcription of its equation by others; the defaults are
    ours. The mean over the workers takes outer Nesterov
    steps of learning rate eta and momentum gamma on the mean drift. The graph Laplacian is that of the topology's
    weights; whoever cannot be heard in a round counts nothing in it.
    """

    name = "gasloc"
    rests = True
    period: Schedule = Every(period=50)
    """Local steps between rounds (H)."""
    lr: float = Field(default=0.7, gt=0)
    """Share of the drift that is taken (eta)."""
    mixing: float = Field(default=1.0, gt=0, le=1)
    """Share of the way to the mean over the links (alpha)."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Outer momentum (gamma)."""
    topology: Topology = RandomGroups()
    """Who talks to whom in a round."""
    codec: Codec = Float32()
    """How parameters travel."""

    def check(self, workers: int) -> None:
        """Refuse also what makes replicas drift apart in random groups; in a fixed graph nothing allowed does."""
        require_two(workers, self.name)
        require_dense(self.codec)
        self.topology.check(workers)
        if isinstance(self.topology, RandomGroups):
            bound = stability_bound(self.momentum, self.topology.size, workers)
            if self.mixing >= bound:
                raise ConfigError(
                    f"rule.mixing: {self.mixing:g} lets the replicas drift apart; with momentum {self.momentum:g}, "
                    f"groups of {min(self.topology.size, workers)} and {workers} workers it must be in (0, {bound:.4g})"
                )

    async def run(self, peer: Peer) -> None:
        start = peer.slot("start", peer.params)
        before = peer.slot("before", peer.params)
        while await peer.train(self.period.steps(peer)):
            links = self.topology.links(peer, round_ := peer.next_round("pair"))
            weights = {worker: self.mixing * weight for worker, weight in self.topology.weights(peer, links).items()}
            ahead = start.lerp(peer.params, self.lr)
            peer.params.copy_(ahead)
            await mix(peer, links, self.codec, round_, weights=weights)
            peer.params.add_(ahead - before, alpha=self.momentum)
            before.copy_(ahead)
            start.copy_(peer.params)
