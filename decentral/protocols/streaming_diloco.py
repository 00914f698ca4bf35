"""Streaming DiLoCo: DiLoCo fragment by fragment, beside the training."""

from __future__ import annotations

from pydantic import Field

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import E3M0, Codec
from decentral.protocols.collectives import AllReduce
from decentral.protocols.fragments import Cut, Layers, Whole, require_partition
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.staggered import Staggered
from decentral.protocols.stream import Stream
from decentral.state import Layout


class StreamingDiLoCo(AllReduceRule):
    """DiLoCo on one fragment p of the model after the other; the mean of a fragment travels while training goes on.

        at t = H + t_p, 2 H + t_p, ...:   Delta_i = anchor_p - theta_i,p
        at t + tau:                       anchor_p <- outer_p(anchor_p, mean_i Delta_i)
                                          theta_i,p <- alpha theta_i,p + (1 - alpha) anchor_p

    Douillard et al., arXiv 2501.18512, algorithm 2, with outer Nesterov 0.4; momentum 0.9 and alpha 0.5 are not stated
    there. The paper's prose, algorithm and example differ in the sign of the offset t_p; these are the steps of the
    example. Outer gradients travel unreduced in E3M0 and are summed in float32, as in the paper. Anchors are the same
    bits everywhere, whatever alpha is. A skipped round leaves its fragment alone, and the next Delta spans both phases.

    Not in the paper is the end: after the last step every fragment that has been trained on since it was last sent is
    sent once more, and all workers take the anchor, which is what the paper evaluates. So one fragment without
    overlap and alpha 0 is DiLoCo, bit for bit.
    """

    name = "streaming_diloco"
    period: FixedPeriod = 100
    """Local steps between two rounds of a fragment (H)."""
    fragments: Cut = Layers()
    """How the model is cut; three layers a fragment, strided, as in the paper."""
    buckets: Cut = Whole()
    """Pieces in which a fragment travels, each as soon as it is final: "whole" fragments, or "layers"."""
    overlap: int = Field(default=1, ge=0)
    """Local steps from sending a fragment to taking its mean (tau), which hide the transfer; the paper advises <= 5."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Share of its own fragment that a worker keeps: 0 takes the anchor, losing tau steps; 1 never hears the others."""
    outer: Outer = Nesterov(lr=0.4)
    """Outer optimiser; each fragment has its own momentum, which starts at zero."""
    codec: Codec = E3M0()
    all_reduce: AllReduce = "gather"

    @property
    def pieces(self) -> bool:
        return not (isinstance(self.fragments, Whole) and isinstance(self.buckets, Whole))

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.overlap >= self.period:
            raise ConfigError(
                f"rule.overlap: {self.overlap} steps are no less than the {self.period} between two rounds of a "
                "fragment, so two would be in flight; lower overlap or raise period"
            )

    def check_layout(self, layout: Layout) -> None:
        for cut in (self.fragments, self.buckets):
            require_partition(cut.split(layout), layout)

    async def run(self, peer: Peer) -> None:
        fragments = self.fragments.split(peer.layout)
        schedule = Staggered(len(fragments), self.period)
        stream = Stream(self, peer, fragments, self.buckets.split(peer.layout))
        while peer.steps_left:
            steps = min(schedule.steps(peer.step), stream.steps_to_landing, peer.steps_left)
            await stream.train(steps, schedule.due(peer.step + steps))
        await stream.land_all(self.alpha)
        stream.send(stream.unsent())
        await stream.land_all(0.0)
        stream.take_anchors()
