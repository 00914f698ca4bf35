"""A sync rule of one's own: every `period` steps, go part of the way to everybody's average.

decentral simulate examples/own_rule/run.toml
"""

from decentral import Peer, SyncRule, agreed_mean
from decentral.protocols import Codec, Int8


class PulledAverage(SyncRule):
    """theta_i <- anchor;  H local steps;  anchor <- anchor + pull (mean_i theta_i - anchor)."""

    period: int = 20
    pull: float = 0.8
    codec: Codec = Int8()

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)  # [P], kept with the replica, apart from the live parameters
        while await peer.train(self.period):  # 0 when the budget is spent
            change = await agreed_mean(peer, peer.params - anchor, self.codec)
            if change is not None:  # None: the round was skipped; go on from our own parameters
                anchor.add_(change, alpha=self.pull)
                peer.params.copy_(anchor)
