"""A worker's part in a rule that sends fragments of the model beside its training."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.fragments import Fragment
from decentral.protocols.rounds import Round

if TYPE_CHECKING:
    from decentral.protocols.streaming_diloco import StreamingDiLoCo


class Stream:
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
