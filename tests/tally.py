"""A rule with a server whose model is a count of pushes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.server import Server
from decentral.protocols.server_rule import LocalStepsRule


class Tally(LocalStepsRule):
    """Coordinate i of the model, 0 at first, counts what has come of worker i."""

    period: int = 2
    seen: ClassVar[list[tuple[int, int]]] = []
    """The worker and the staleness of every push that was taken, by all servers."""

    async def run(self, peer: Peer) -> None:
        peer.params.zero_()
        await super().run(peer)

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        if not await peer.train(assigned):
            return None
        push = torch.zeros_like(anchor)
        push[peer.id] = 1
        return push

    async def serve(self, server: Server) -> None:
        while (push := await server.push()) is not None:
            server.model.add_(push.values)
            server.updated([push.worker])
            self.seen.append((push.worker, push.staleness))
            server.dispatch(push.worker, self.period)
