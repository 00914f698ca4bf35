"""Rounds of rules that promise equal replicas: contribute, stage, decide.

See `decentral/members.py` for how a round is decided. A round costs one vote to the roster besides the collective's own
messages, and touches nothing live until it is decided.
"""

from __future__ import annotations

import asyncio

from torch import Tensor

from decentral.errors import PeerGone
from decentral.members import Ballot
from decentral.peer import Peer
from decentral.protocols.codecs import Codec
from decentral.protocols.collectives import ALL_REDUCE, AllReduce, Attempt
from decentral.replica import digest
from decentral.wire import FrameError


class Round:
    """One round on a channel: pieces are reduced in the background as they are contributed, then decided together.

    A channel's rounds follow one another; channels may be in flight at the same time.
    """

    def __init__(self, peer: Peer, codec: Codec, all_reduce: AllReduce = "butterfly", channel: str = "sync") -> None:
        self._peer, self._codec, self._reduce = peer, codec, ALL_REDUCE[all_reduce]
        self._channel = channel
        self._number = peer.next_round(channel)
        self._members = peer.members
        self._tasks: dict[int, asyncio.Task[Tensor | None]] = {}
        self.pieces: dict[int, Tensor] = {}

    def contribute(self, piece: Tensor, index: int = 0) -> None:
        """Start reducing `piece` `[n]` with the others' pieces of that index, in whatever order they contribute them.

        It is kept for a second attempt: do not change it before `settle` returns.
        """
        self.pieces[index] = piece
        self._tasks[index] = self._start(index)

    async def settle(self) -> list[Tensor] | None:
        """Return the pieces' means by ascending index, the same bits for every member; None if it was skipped."""
        while True:
            staged = [await self._tasks[index] for index in sorted(self._tasks)]
            whole = [mean for mean in staged if mean is not None]
            checksum = digest(whole) if len(whole) == len(staged) else None
            ballot = Ballot(self._peer.id, self._channel, self._number, self._members.epoch, checksum)
            decision = await self._peer.vote(ballot)
            if decision.outcome != "again":
                break
            self._members = decision.members
            self._tasks = {index: self._start(index) for index in self.pieces}
        self._peer.ended_round(self._channel, self._number, decision.outcome, decision.members.ids)
        return None if decision.outcome == "skipped" else whole

    def _start(self, index: int) -> asyncio.Task[Tensor | None]:
        attempt = Attempt(self._members, self._channel, self._number, index)
        return self._peer.spawn(self._stage(self.pieces[index], attempt))

    async def _stage(self, values: Tensor, attempt: Attempt) -> Tensor | None:
        try:
            return await self._reduce(self._peer, values, self._codec, attempt)
        except (PeerGone, TimeoutError, FrameError):
            return None


async def agreed_mean(peer: Peer, values: Tensor, codec: Codec, all_reduce: AllReduce = "butterfly") -> Tensor | None:
    """Return the mean of all members' `values` `[n]`, the same bits for everybody; None if the round was skipped."""
    round_ = Round(peer, codec, all_reduce)
    round_.contribute(values)
    means = await round_.settle()
    return None if means is None else means[0]
