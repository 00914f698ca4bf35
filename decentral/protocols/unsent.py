"""What a worker's codec has left unsent, when the worker is told to leave: another one sends it.

A residual is added to what its worker sends next. Sums do not care who sends: a worker that is told in time hands its
residual to the next member, which adds it to its own, so that what all workers have sent and what they keep are as
much in sum as if it had stayed. Nothing travels as long as nobody leaves.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable

from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Coder, Float32
from decentral.protocols.codecs.coder import RESIDUAL
from decentral.wire import FrameError, Tag, signal, signal_text

PLAIN = Float32()
TAKEN, LEAVING = "taken", "leaving"


Party = Callable[[], Iterable[int]]
"""Returns those who send to the same receivers now."""


def coder_of(peer: Peer, codec: Codec, name: str, party: Party) -> Coder:
    """Return the worker's coder: it remembers in its own slots `name`.*, and one of the `party` inherits residuals."""

    def slot(what: str, like: Tensor) -> Tensor:
        full = f"{name}.{what}"
        memory = peer.slot(full, like, own=True)
        if what == RESIDUAL and full not in peer.estate:
            peer.estate[full] = Unsent(peer, full, memory, party)
        return memory

    return codec.coder(slot) or Coder(codec)


class Unsent:
    """One residual of a worker's: it takes in those of workers that leave, and goes to another when the worker does."""

    def __init__(self, peer: Peer, name: str, residual: Tensor, party: Party) -> None:
        self._peer, self._residual, self._party = peer, residual, party
        self._tag, self._answer = Tag("unsent", 0, name), Tag("unsent", 0, f"{name} heard")
        self._inherited: list[Tensor] = []
        peer.keepers.insert(0, self)  # before anybody who copies the worker's state at that rest
        peer.spawn(self._listen())

    def rest(self) -> None:
        """Add what has come from others: no round is under way that would take it for its own."""
        while self._inherited:
            self._residual.add_(self._inherited.pop(0))

    async def hand_on(self) -> None:
        """Give the residual to the next worker that stays, in ascending order, after the last to the first."""
        self.rest()
        own = self._peer.id
        for worker in sorted(set(self._party()) - {own}, key=lambda worker: (worker < own, worker)):
            if await self._is_taken_by(worker):
                return

    async def _is_taken_by(self, worker: int) -> bool:
        try:
            await self._peer.send(worker, self._tag, PLAIN.lend(self._residual))
            return signal_text((await self._peer.recv(worker, self._answer))[1]) == TAKEN
        except (PeerGone, asyncio.TimeoutError, TimeoutError, FrameError):
            return False

    async def _listen(self) -> None:
        """Take what others leave, for ever; who leaves too says so, and they ask the next one."""
        while True:
            source, packet = await self._peer.recv(None, self._tag, math.inf)
            try:
                if not self._peer.leaves:
                    self._inherited.append(PLAIN.decode(packet, self._residual))
            except FrameError as error:
                self._peer.refuse(source, error)
                continue
            self._peer.send(source, self._answer, signal(LEAVING if self._peer.leaves else TAKEN))
