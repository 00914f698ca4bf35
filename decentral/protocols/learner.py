"""A learner of Decoupled DiLoCo: trains on a clock of its own, and answers the syncer meanwhile."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.hosting import GLOBALS, deliver
from decentral.protocols.syncer import Syncer, down, up
from decentral.wire import SIGNAL, FrameError, Packet, Tag, signal, signal_text

if TYPE_CHECKING:
    from decentral.protocols.decoupled_diloco import DecoupledDiLoCo


class Learner:
    """One worker's side: what it has of the global model, and how far it has trained on each fragment."""

    def __init__(self, rule: DecoupledDiLoCo, peer: Peer) -> None:
        self._rule, self.peer = rule, peer
        self.fragments = rule.fragments.split(peer.layout)
        self.anchor = peer.slot("anchor", peer.params)
        self._copy = peer.slot("copy", peer.params)  # the parameters at the last look: live ones change meanwhile
        self._inbox: dict[int, Tensor] = {}
        self._taken = [(peer.step, peer.samples)] * len(self.fragments)
        self.step, self._samples = peer.step, peer.samples  # as of the last look
        self._looked_s = peer.now()
        self.step_s = 0.0
        self.finished = False
        self.border = asyncio.Event()

    def look(self) -> None:
        """Between two phases: take the fragments that came, and copy the parameters for whoever asks meanwhile."""
        peer, steps = self.peer, self.peer.step - self.step
        if steps:
            step_s = (peer.now() - self._looked_s) / steps
            self.step_s = (self.step_s + step_s) / 2 if self.step_s else step_s
        self._looked_s = peer.now()
        self.step, self._samples = peer.step, peer.samples
        for index, values in self._inbox.items():
            self.fragments[index].write(self.anchor, values)
            self.fragments[index].write(peer.params, values)
            self._taken[index] = (self.step, self._samples)
        self._inbox.clear()
        self._copy.copy_(peer.params)
        self.border.set()

    def finish(self) -> None:
        """No more steps: from now on take fragments as they come."""
        self.finished = True
        self.look()

    async def follow(self) -> None:
        """Answer the syncer until it ends; when it dies, its successor, and be that ourselves if need be."""
        while True:
            host = min(self.peer.members)
            serving = self.peer.spawn(Syncer(self._rule, self).serve()) if host == self.peer.id else None
            try:
                for round_ in itertools.count(1):
                    if not await self._take_part(host, round_):
                        break
            except PeerGone:
                if host not in self.peer.members.finished:
                    continue
            if serving:
                await serving
            return

    async def _take_part(self, host: int, round_: int) -> bool:
        """Answer one pull and note what it came to; return False when there will be none any more."""
        if await self._hear(host, Tag(down(host), round_, "launch")) is None:
            return False
        index = (round_ - 1) % len(self.fragments)
        deliver(self.peer, host, Tag(up(host), round_, "push"), self._contribution(index))
        result = await self._hear(host, Tag(down(host), round_, "global"))
        if result is None:
            return False
        going_on = True
        try:
            if result.codec == SIGNAL:
                going_on = signal_text(result) != "end"
            else:
                self._inbox[index] = GLOBALS.decode(result, self.fragments[index].read(self.anchor))
        except FrameError as error:
            self.peer.refuse(host, error)
        self.peer.close(down(host), round_)
        if self.finished:
            self.look()
        return going_on

    def _contribution(self, index: int) -> Packet:
        step, samples = self._taken[index]
        if index in self._inbox or self.step == step:
            nothing_more = self.finished and all(taken[0] == self.step for taken in self._taken)
            return signal("done" if nothing_more else "nothing")
        fragment = self.fragments[index]
        packet = self._rule.codec.encode(fragment.read(self.anchor) - fragment.read(self._copy))
        packet.weight = (self._samples - samples) ** 2 // (self.step - step)
        return packet

    async def _hear(self, host: int, tag: Tag) -> Packet | None:
        """Return the syncer's packet; None when our steps are done and it has been silent for all our patience."""
        while True:
            try:
                return (await self.peer.recv(host, tag))[1]
            except TimeoutError:
                if self.finished:
                    return None
