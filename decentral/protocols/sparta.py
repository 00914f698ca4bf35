"""SPARTA: average a few parameters, other ones every time."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.collectives import require_dense
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import require_two


class SPARTA(AllReduceRule):
    """Every step a random share of the parameters, the same everywhere, is averaged over all workers.

        mask K drawn from (seed, round);   y_i = theta_i[K];   later: theta_i[K] <- mean_j y_j + local steps since

    SPARTA (OpenReview stFPf3gzq1): 0.05 to 0.5 % of the parameters a step. What a worker has trained while the mean
    travelled is kept, as in LOSCAR-SGD (arXiv 2605.20866), whose formula takes theta_i[K] - y_i for it; both from
    abstracts and notes. If another mean of the same coordinate has come in between, that difference holds more than
    local steps and would undo the averaging, so the worker keeps account of what it was moved by. The indices need not
    travel. Here K takes one element of each of |K| equal stretches of the vector, at random: after n rounds a
    coordinate has been averaged with probability 1 - (1 - rate)^n. Replicas stay different.
    """

    name = "sparta"
    newcomers = "none"
    period: Schedule = Every(period=1)
    """Local steps between rounds."""
    rate: float = Field(default=0.005, gt=0, le=1)
    """Share of the parameters that is averaged in a round."""
    overlap: int = Field(default=0, ge=0)
    """Rounds by which a mean may come late, which hide the transfer; the authors saw no loss up to 10."""

    def check(self, workers: int) -> None:
        super().check(workers)
        require_two(workers, self.name)
        require_dense(self.codec)
        if self.merge.centered:
            raise ConfigError(
                f"rule.merge: '{self.merge.spelling()}' starts from the last round's merge, and '{self.name}' merges "
                "other parameters in each round; choose another merge"
            )

    def check_checkpoints(self) -> None:
        """Refuse also an overlap: some mean is always on its way."""
        super().check_checkpoints()
        if self.overlap:
            raise ConfigError(
                f"checkpoint.url: with rule.overlap = {self.overlap} a mean is always on its way and workers are never "
                "at rest; set overlap to 0, or leave the URL out"
            )

    async def run(self, peer: Peer) -> None:
        flights: deque[_Flight] = deque()
        lane = 0  # a channel has one round in flight
        while await peer.train(self.period.steps(peer)):
            flights.append(self._send(peer, f"mask {lane}"))
            lane = (lane + 1) % (self.overlap + 1)
            if len(flights) > self.overlap:
                await self._land(peer, flights.popleft())
        while flights:
            await self._land(peer, flights.popleft())

    def _send(self, peer: Peer, channel: str) -> _Flight:
        round_ = self.begin(peer, channel)
        mask = shared_mask(peer, f"sparta {channel}", round_.number, self.rate)
        sent = peer.params[mask]
        round_.contribute(sent)
        return _Flight(mask, sent - peer.slot("moved")[mask], peer.spawn(round_.settle()))

    async def _land(self, peer: Peer, flight: _Flight) -> None:
        means = await flight.means
        if means is not None:
            mask, moved = flight.mask, peer.slot("moved")
            before = peer.params[mask]
            after = means[0] + ((before - moved[mask]) - flight.trained)
            moved[mask] += after - before
            peer.params[mask] = after


class _Flight(NamedTuple):
    mask: Tensor | slice
    trained: Tensor
    """What was sent, less what means had moved it by: the worker's own steps."""
    means: asyncio.Task[list[Tensor] | None]


def shared_mask(peer: Peer, purpose: str, round_: int, rate: float) -> Tensor | slice:
    """Return the indices `[K]`, ascending, of a share `rate` of the parameters: the same on every worker.

    One is drawn from each of K stretches that differ in length by one at most. Phantoms are asked for K elements.
    """
    size = peer.layout.size
    count = max(1, round(rate * size))
    if not isinstance(peer.params, Tensor):
        return slice(count)
    generator = torch.Generator().manual_seed(peer.rng(purpose, round_).getrandbits(63))
    bounds = torch.arange(count + 1) * size // count
    places = torch.rand(count, generator=generator, dtype=torch.float64) * bounds.diff()
    return (bounds[:-1] + places.long()).to(peer.params.device)
