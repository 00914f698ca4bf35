"""Streaming DiLoCo: DiLoCo fragment by fragment, beside the training."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial

from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import E3M0, CodecField
from decentral.protocols.collectives import AllReduce
from decentral.protocols.fragments import CutField, Fragment, Layers, Whole, require_partition
from decentral.protocols.outer import Nesterov, OuterField
from decentral.protocols.rounds import AllReduceRule, Round
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.staggered import Staggered
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
    fragments: CutField = Layers()
    """How the model is cut; three layers a fragment, strided, as in the paper."""
    buckets: CutField = Whole()
    """Pieces in which a fragment travels, each as soon as it is final: "whole" fragments, or "layers"."""
    overlap: int = Field(default=1, ge=0)
    """Local steps from sending a fragment to taking its mean (tau), which hide the transfer; the paper advises <= 5."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Share of its own fragment that a worker keeps: 0 takes the anchor, losing tau steps; 1 never hears the others."""
    outer: OuterField = Nesterov(lr=0.4)
    """Outer optimiser; each fragment has its own momentum, which starts at zero."""
    codec: CodecField = E3M0()
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
        stream = _Stream(self, peer, fragments, self.buckets.split(peer.layout))
        while peer.steps_left:
            steps = min(schedule.steps(peer.step), stream.steps_to_landing, peer.steps_left)
            await stream.train(steps, schedule.due(peer.step + steps))
        await stream.land_all(self.alpha)
        stream.send(stream.unsent())
        await stream.land_all(0.0)
        stream.take_anchors()


class _Stream:
    """One worker's fragments: when they were sent, which of them are in flight."""

    def __init__(
        self, rule: StreamingDiLoCo, peer: Peer, fragments: Sequence[Fragment], buckets: Sequence[Fragment]
    ) -> None:
        self._rule, self._peer, self._fragments = rule, peer, fragments
        self._pieces = [fragment.cut(buckets) for fragment in fragments]
        self._anchor = peer.slot("anchor", peer.params)
        self._momentum = peer.slot("momentum")
        self._sent_at: dict[int, int] = {}
        self._rounds: dict[int, Round] = {}  # of fragments of which some pieces are on their way
        self._flights: dict[int, asyncio.Task[list[Tensor] | None]] = {}

    @property
    def steps_to_landing(self) -> int:
        """Local steps until the next mean is to be taken that need not be taken now; all that are left if none is."""
        lands = [self._steps_to_landing(index) for index in self._flights]
        return min([steps for steps in lands if steps > 0], default=self._peer.steps_left)

    def _steps_to_landing(self, index: int) -> int:
        return self._sent_at[index] + self._rule.overlap - self._peer.step

    async def train(self, steps: int, due: Sequence[int]) -> None:
        """Train; take the means that are to be taken now before their fragments are used, and send those due then."""
        landing = [index for index in sorted(self._flights) if self._steps_to_landing(index) <= 0]
        gates = {self._fragments[index].spans: partial(self._land, index, self._rule.alpha) for index in landing}
        sending = [(index, piece) for index in due for piece in range(len(self._pieces[index]))]
        then = self._peer.step + steps
        spans = [self._pieces[index][piece].spans for index, piece in sending]
        async for final in self._peer.train_in_pieces(steps, spans, gates):
            self._contribute(*sending[final])
        self._launch(then)

    def send(self, indices: Iterable[int]) -> None:
        """Send fragments as they are now."""
        for index in indices:
            for piece in range(len(self._pieces[index])):
                self._contribute(index, piece)
        self._launch(self._peer.step)

    def _contribute(self, index: int, number: int) -> None:
        if index not in self._rounds:
            self._rounds[index] = self._rule.begin(self._peer, f"fragment {index}", self._pieces[index])
        piece = self._pieces[index][number]
        self._rounds[index].contribute(piece.read(self._anchor) - piece.read(self._peer.params), number)

    def _launch(self, step: int) -> None:
        """All pieces of the fragments of this step are on their way: settle their rounds while training goes on."""
        for index, round_ in self._rounds.items():
            self._flights[index] = self._peer.spawn(round_.settle())
            self._sent_at[index] = step
        self._rounds.clear()

    async def land_all(self, alpha: float) -> None:
        """Take the means of all that are in flight."""
        for index in sorted(self._flights):
            await self._land(index, alpha)

    async def _land(self, index: int, alpha: float) -> None:
        means = await self._flights.pop(index)
        if means is None:
            del self._sent_at[index]
            return
        for piece, mean in zip(self._pieces[index], means, strict=True):
            self._step(piece, mean, alpha)

    def _step(self, fragment: Fragment, mean: Tensor, alpha: float) -> None:
        anchor, momentum = fragment.read(self._anchor), fragment.read(self._momentum)
        self._rule.outer.step(anchor, mean, momentum)
        fragment.write(self._anchor, anchor)
        fragment.write(self._momentum, momentum)
        fragment.write(self._peer.params, anchor.lerp(fragment.read(self._peer.params), alpha))

    def unsent(self) -> list[int]:
        """Return the fragments that hold steps which no round has taken."""
        return [index for index in range(len(self._fragments)) if self._sent_at.get(index) != self._peer.step]

    def take_anchors(self) -> None:
        """Give the parameters their anchors, but for fragments whose last round was skipped."""
        for index in self._sent_at:
            self._fragments[index].write(self._peer.params, self._fragments[index].read(self._anchor))
