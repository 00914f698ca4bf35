"""AD-PSGD: each worker averages with one other whenever it likes, and nobody waits for a round."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import exchange, require_dense
from decentral.protocols.merge import pull
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import both_ways, require_two
from decentral.wire import FrameError, Tag, signal, signal_text

ASK = Tag("ask", 0)


class ADPSGD(SyncRule):
    """After every H local steps an active worker averages with a random passive one, who goes on training meanwhile.

        x_i, x_j <- (x_i + x_j) / 2;   x_i <- x_i + (theta_i after H local steps - theta_i),   theta_i the x_i they saw

    Lian et al., arXiv 1710.06952, from memory of the paper: on a bipartite graph (here every second worker is active,
    the others are passive, and each active one may choose any passive one) waiting in a circle cannot happen. A passive
    worker answers one at a time; the pull reaches its parameters before its next local steps, and its own drift, made
    from older parameters, is added to what has been averaged since; when it has done its steps it goes on answering
    until no active worker is left. A pair that fails changes neither; the mean of x is kept whatever the codec loses.
    """

    name = "ad_psgd"
    period: Schedule = Every(period=1)
    """Local steps between averages of an active worker (H)."""
    codec: Codec = Float32()
    """How parameters travel."""

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)

    async def run(self, peer: Peer) -> None:
        model = peer.slot("model", peer.params)
        active = peer.cohort.rank(peer.id) % 2 == 0
        answers = None if active else peer.spawn(self._answer(peer, model))
        while True:
            began = model.clone()
            peer.params.copy_(model)
            if not await peer.train(self.period.steps(peer)):
                break
            model.add_(peer.params - began)
            if active:
                await self._ask(peer, model)
        if answers is not None:
            await answers
        peer.params.copy_(model)

    async def _ask(self, peer: Peer, model: Tensor) -> None:
        """Average with a random passive worker."""
        round_ = peer.next_round(channel := _channel(peer.id))
        passive = [worker for worker in peer.cohort.ids[1::2] if worker in peer.members]
        if passive:
            other = peer.rng(f"ad_psgd {peer.id}", round_).choice(passive)
            peer.send(other, ASK, signal(str(round_)))
            await self._average(peer, model, other, channel, round_)

    async def _answer(self, peer: Peer, model: Tensor) -> None:
        """Average with whoever asks, one at a time, until the active workers have left."""
        while any(worker in peer.members for worker in peer.cohort.ids[0::2]):
            with suppress(PeerGone, TimeoutError):
                source, packet = await peer.recv(None, ASK, among=peer.members)
                try:
                    await self._average(peer, model, source, _channel(source), _number(signal_text(packet)))
                except FrameError as error:
                    peer.refuse(source, error)

    async def _average(self, peer: Peer, model: Tensor, other: int, channel: str, round_: int) -> None:
        sent = self.codec.round_trip(model)
        links = both_ways((other,))
        heard = await exchange(peer, links, model, self.codec, channel=channel, round_=round_)
        if heard:
            pull(model, sent, heard, {other: 0.5})


def _channel(active: int) -> str:
    return f"pair {active}"


def _number(text: str) -> int:
    if not text.isdecimal():
        raise FrameError("header", f"'{text}' is no number of a round")
    return int(text)
