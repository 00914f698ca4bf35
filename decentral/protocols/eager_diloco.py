"""Eager DiLoCo: the all-reduce takes a whole phase, and a worker's own part does not wait for it."""

from __future__ import annotations

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class EagerDiLoCo(AllReduceRule):
    """DiLoCo whose outer gradients travel during the next phase: the others' are a phase late, one's own is fresh.

        D_i(t) = anchor_i - theta_i;   anchor_i <- outer_i(anchor_i, (1 / M) (D_i(t) + sum_{j != i} D_j(t - H)))

    Kale et al., "Eager updates for overlapped communication", arXiv 2502.12996, as two third-party notes transcribe it;
    setting as in Streaming DiLoCo. Anchors differ by the workers' fresh parts. One worker is DiLoCo with one worker.

    The first step takes the own part alone. A skipped round is sent once more with the next one. The round after the
    last step is waited for, and its mean takes the place of the own part: no step's work is lost.
    """

    name = "eager_diloco"
    newcomers = "none"
    rests = False
    period: Schedule = Every(period=30)
    """Local steps between rounds (H), which hide the transfer."""
    outer: Outer = Nesterov(lr=0.4)
    """Outer optimiser; its momentum starts at zero, and differs from worker to worker."""

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.merge.robust:
            raise ConfigError(
                f"rule.merge: from '{self.merge.spelling()}' a worker cannot take its own part away, as "
                f"'{self.name}' does; take merge 'mean'"
            )

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")
        sent = peer.slot("sent")  # outer gradients on their way
        applied = peer.slot("applied")  # what we have stepped on of them
        flight = None
        while await peer.train(self.period.steps(peer)):
            means = await flight if flight else None
            fresh = anchor - peer.params
            gradient = fresh / len(peer.members)
            if means is None:  # the first round, or one that was skipped
                sent.add_(fresh)
                applied.add_(gradient)
            else:
                late = means[0] - applied
                sent.copy_(fresh)
                applied.copy_(gradient)
                gradient = gradient + late
            flight = self.launch(peer, sent.clone())
            if not peer.steps_left:
                means = await flight
                if means is not None:
                    gradient = gradient - applied + means[0]
            self.outer.step(anchor, gradient, momentum)
            peer.params.copy_(anchor)
