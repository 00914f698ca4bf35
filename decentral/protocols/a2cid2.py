"""A2CiD2: asynchronous gossip along Poisson clocks, with a continuous momentum."""

from __future__ import annotations

import asyncio
import math

import torch
from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import exchange, require_dense
from decentral.protocols.edge_rates import EdgeRates, clocks
from decentral.protocols.graphs import Ring
from decentral.protocols.hosting import hear, stay_of
from decentral.protocols.merge import pull
from decentral.protocols.poisson import Meeting, Meetings, flow
from decentral.protocols.rounds import agreed_mean
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import Topology, both_ways, require_two
from decentral.wire import Tag, signal


class A2CiD2(SyncRule):
    """Each edge of a graph rings like a Poisson clock while the workers train; its ends then meet.

        always:     dx = eta (y - x) dt;   dy = eta (x - y) dt
        drift d:    x_i <- x_i + d;   y_i <- y_i + d             (theta after H local steps from x_i, minus x_i)
        meeting:    x_i <- x_i - 1/2 (x_i - x_j);   y_i <- y_i - a (x_i - x_j);   x_j, y_j likewise
        eta = 1 / (2 sqrt(chi_1 chi_2));   a = 1/2 sqrt(chi_1 / chi_2)

    Nabli, Belilovsky and Oyallon, arXiv 2306.08289. Times are in local phases of the average worker, as measured in the
    first. Both ends run the continuous part up to the meeting's time before they exchange (the public code does it
    after, which moves the mean): the means of x and of y are kept, whatever the codec loses and however late packets
    come. With eta = 0 it is plain pairwise gossip. Who has done its steps goes on meeting the others until all have.
    """

    name = "a2cid2"
    period: Schedule = Every(period=1)
    """Local steps in a phase (H)."""
    topology: Topology = Ring()
    """The graph; the same in every round."""
    rate: float = Field(default=1.0, gt=0)
    """Meetings of the average worker in a local phase of the average worker."""
    edge_rates: EdgeRates = "uniform"
    """How these are spread over the edges."""
    eta: float | None = Field(default=None, ge=0)
    """Speed of the continuous part in a local phase; as above if unset, 0: none."""
    codec: Codec = Float32()
    """How parameters travel."""

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)
        self.topology.check(workers)
        self.topology.neighbours(0, range(workers))

    async def run(self, peer: Peer) -> None:
        gossip = _Gossip(peer, self)
        began = peer.now()
        if steps := await gossip.drift():
            own = torch.tensor([peer.now() - began])
            mean = await agreed_mean(peer, own, Float32(), channel="clock")
            peer.spawn(gossip.meet(float(own if mean is None else mean)))
            while steps:
                steps = await gossip.drift()
            await _all_done(peer)
        await gossip.stop()


class _Gossip:
    """One worker's x and y.

    Drifts move both alike, so they may come at any time; the continuous part must not run past the next meeting,
    however late that takes place.
    """

    def __init__(self, peer: Peer, rule: A2CiD2) -> None:
        self._peer, self._rule = peer, rule
        graph = clocks(rule.topology, peer.cohort.ids, rule.edge_rates)
        total = rule.rate * len(peer.cohort) / 2
        self._eta = total / (2 * math.sqrt(graph.slow * graph.resistance)) if rule.eta is None else rule.eta
        self._pull = math.sqrt(graph.slow / graph.resistance) / 2
        self._meetings = Meetings(peer, graph.rates(total))
        self._model = peer.slot("model", peer.params)
        self._buffer = peer.slot("buffer", peer.params)
        self._began, self._unit = math.inf, 1.0
        self._since = self._horizon = 0.0
        self._busy = asyncio.Lock()

    async def drift(self) -> int:
        """Train for a local phase from where x is now; return its steps."""
        peer = self._peer
        self._run_until((peer.now() - self._began) / self._unit)
        began = self._model.clone()
        peer.params.copy_(began)
        steps = await peer.train(self._rule.period.steps(peer))
        if steps:
            drift = peer.params - began
            self._model.add_(drift)
            self._buffer.add_(drift)
        return steps

    async def meet(self, unit: float) -> None:
        """Keep all meetings from now on; `unit` is the length of a local phase in seconds."""
        self._began, self._unit = self._peer.now(), unit
        while (meeting := self._meetings.next()) is not None:
            self._horizon = meeting.time
            await asyncio.sleep(max(0.0, self._began + meeting.time * unit - self._peer.now()))
            async with self._busy:
                self._run_until(meeting.time)
                await self._average(meeting)
        self._horizon = math.inf

    async def stop(self) -> None:
        """Keep no more meetings, when the one that is under way has ended, and hand over x."""
        await self._busy.acquire()
        self._peer.params.copy_(self._model)

    async def _average(self, meeting: Meeting) -> None:
        codec, other = self._rule.codec, meeting.other
        sent = codec.round_trip(self._model)
        links = both_ways((other,))
        heard = await exchange(self._peer, links, self._model, codec, channel=meeting.channel, round_=meeting.round)
        if heard:
            pull(self._model, sent, heard, {other: 0.5})
            pull(self._buffer, sent, heard, {other: self._pull})

    def _run_until(self, time: float) -> None:
        time = min(time, self._horizon)
        if time > self._since:
            flow(self._model, self._buffer, self._eta, time - self._since)
            self._since = time


async def _all_done(peer: Peer) -> None:
    """Wait until every other member has come here too, or has left."""
    done = Tag("done", peer.next_round("done"))
    others = [member for member in peer.members if member != peer.id]
    for other in others:
        peer.send(other, done, signal("done"))
    for other in others:
        await hear(peer, other, stay_of(peer, other), done)
