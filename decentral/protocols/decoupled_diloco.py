"""Decoupled DiLoCo: learners on clocks of their own, and a syncer that waits for a quorum of them."""

from __future__ import annotations

from pydantic import Field

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.fragments import Balanced, Cut, require_partition
from decentral.protocols.learner import Learner
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import FixedPeriod
from decentral.state import Layout


class DecoupledDiLoCo(SyncRule):
    """A syncer pulls one fragment p after the other from learners that never wait, and sends the merged one to all.

        Delta_i = global_p - theta_i,p;   w_i = tokens_i^2 / steps_i;   global_p <- outer_p(global_p, RDA(w, Delta))

    arXiv 2604.21428, from its abstract and a third-party implementation. Steps and tokens are those a learner has done
    since it last took the fragment; with none it sends nothing. A round waits for K contributions (or until everybody
    has answered), then for a grace, and goes on without the others, who lose these steps of the fragment. A learner
    answers at once, from a copy of its parameters at the last look, and takes fragments at the next one, with the loss
    of its steps since that copy: at v times the syncer's speed it needs H > 2 tau / v to have anything to send. RDA is
    `merge.radial_mean` for each tensor of a layer, the plain weighted mean for embeddings, head and the like. Weights
    are the learners' own word.

    The syncer is a coroutine beside the lowest member's worker. It launches a fragment every H / P of that worker's
    steps: on a fast link it would launch without end, and H would collapse. If it dies, the next lowest member begins
    again from the global fragments that it has, with no momentum. It serves until nobody has anything more to send, so
    all replicas end equal.
    """

    name = "decoupled_diloco"
    unaccountable = "a round goes on without learners that are late, which lose these steps"
    period: FixedPeriod = 24
    """Local steps of the syncer's worker between two launches of a fragment (H)."""
    fragments: Cut = Balanced()
    """How the model is cut (P fragments)."""
    overlap: int = Field(default=2, ge=1)
    """Local steps between two looks at what came (tau); they hide the transfer."""
    quorum: int = Field(default=1, ge=1)
    """Contributions that a round waits for (K)."""
    grace: float = Field(default=1.0, ge=0)
    """Share of the learners' remaining slack, tau steps less quorum and transfer, that is waited besides (gamma)."""
    radial: bool = True
    """Merge layers by RDA; otherwise by the weighted mean."""
    outer: Outer = Nesterov()
    """Outer optimiser; each fragment has its own momentum."""
    codec: Codec = Float32()
    """How outer gradients travel; global fragments travel in float32."""

    def check(self, workers: int) -> None:
        if self.quorum > workers:
            raise ConfigError(f"rule.quorum: {self.quorum} contributions cannot come from {workers} workers")
        if self.overlap > self.period:
            raise ConfigError(
                f"rule.overlap: a learner that looks every {self.overlap} steps misses fragments launched every "
                f"{self.period}; lower overlap or raise period"
            )
        if self.codec.loss not in ("none", "rounding"):
            raise ConfigError(
                f"rule.codec: '{self.codec.spelling()}' leaves much of a vector out, and a learner cannot know whether "
                "what it sent was in time to count; choose a codec that keeps every element, such as 'int4' or 'e3m0'"
            )

    def check_layout(self, layout: Layout) -> None:
        require_partition(self.fragments.split(layout), layout)

    async def run(self, peer: Peer) -> None:
        learner = Learner(self, peer)
        following = peer.spawn(learner.follow())
        while await peer.train(self.overlap):
            learner.look()
        learner.finish()
        await following
