"""DADAO: decoupled accelerated decentralised optimisation of a strongly convex sum."""

from __future__ import annotations

import functools
import math

import torch
from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.members import Members
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import exchange, require_dense
from decentral.protocols.edge_rates import Clocks, EdgeRates, clocks
from decentral.protocols.graphs import Ring
from decentral.protocols.merge import pull
from decentral.protocols.poisson import Meeting, Meetings, arrivals
from decentral.protocols.rule import SyncRule
from decentral.protocols.topology import Topology, both_ways, require_two

STATE = ("x", "x_slow", "y", "y_slow", "z", "z_slow")


class DADAO(SyncRule):
    """Gradients and meetings along Poisson clocks, with momenta in both; for L-smooth and mu-strongly convex losses.

        dx = eta (x~ - x) dt;            dx~ = eta (x - x~) dt
        dy = alpha (y~ - y) dt;          dy~ = -theta (y + z + nu x~) dt
        dz = alpha (z~ - z) dt;          dz~ = alpha~ (z - z~) dt
        gradient (rate 1 a worker):      q = grad f_i(x_i) - nu x_i - y~_i
            x_i <- x_i - gamma q;   x~_i <- x~_i - gamma~ q;   y~_i <- y~_i + (delta + delta~) q
        meeting (rate lambda in all):    r = (y_i + z_i) - (y_j + z_j)
            z_i <- z_i - beta r;   z~_i <- z~_i - beta~ r;   z_j, z~_j likewise

    Nabli and Oyallon, arXiv 2208.00779, with the constants of its code: nu = mu / 2, eta = alpha~ = sqrt(nu / L) / 8,
    alpha = delta = sqrt(nu / L) / 4, theta = sqrt(L / nu) / 2, gamma = 1 / (4 L), gamma~ = 1 / (4 sqrt(nu L)),
    delta~ = 1, beta = 1/2, beta~ = 2 chi_1 sqrt(L / nu). It needs lambda >= sqrt(2 chi_1 chi_2), the chi of the edges'
    shares. Time is logical: each worker takes its events in their order as fast as it can, so what it comes to does not
    depend on who is quicker. Who has done its steps goes on meeting the others until the last gradient of all. The
    inner optimiser only counts the steps; its update is not used. A worker that dies takes its part of the sum of all z
    along, which moves what the others come to.
    """

    name = "dadao"
    needs_task = "it asks for gradients, and applies them itself"
    smoothness: float = Field(default=1.0, gt=0)
    """Largest curvature of any worker's loss (L). The defaults are those of the task 'quadratic'."""
    convexity: float = Field(default=0.1, gt=0)
    """Smallest curvature of any worker's loss (mu)."""
    topology: Topology = Ring()
    """The graph; the same in every round."""
    rate: float | None = Field(default=None, gt=0)
    """Meetings of all workers together in the time of one gradient a worker (lambda); the least possible if unset."""
    edge_rates: EdgeRates = "uniform"
    """How these are spread over the edges."""
    codec: Codec = Float32()
    """How y + z travels."""

    def check(self, workers: int) -> None:
        """Refuse also a rate of meetings at which it may diverge."""
        require_two(workers, self.name)
        require_dense(self.codec)
        self.topology.check(workers)
        if self.convexity > self.smoothness:
            raise ConfigError(
                f"rule.convexity: {self.convexity:g} must be at most rule.smoothness, which is {self.smoothness:g}"
            )
        least = self._least_rate(clocks(self.topology, tuple(range(workers)), self.edge_rates))
        if self.rate is not None and self.rate < least * (1 - 1e-9):
            raise ConfigError(
                f"rule.rate: {self.rate:g} meetings a gradient are too few for this graph; it must be at least "
                f"{least:.4g}"
            )

    async def run(self, peer: Peer) -> None:
        graph = clocks(self.topology, peer.cohort.ids, self.edge_rates)
        total = self.rate or self._least_rate(graph)
        state = {name: peer.slot(name, peer.params if name.startswith("x") else None) for name in STATE}
        meetings = Meetings(peer, graph.rates(total))
        meeting, since = meetings.next(), 0.0
        for time in [*arrivals(peer.seed, peer.id, peer.steps_left), _horizon(peer.seed, peer.cohort, peer.steps_left)]:
            while meeting is not None and meeting.time < time:
                self._flow(state, meeting.time - since)
                since = meeting.time
                await self._meet(peer, state, meeting, graph.slow / total)
                meeting = meetings.next()
            self._flow(state, time - since)
            since = time
            if peer.steps_left:
                await self._descend(peer, state)
        peer.params.copy_(state["x"])

    async def _descend(self, peer: Peer, state: dict[str, Tensor]) -> None:
        big, nu = self.smoothness, self.convexity / 2
        peer.params.copy_(state["x"])
        async for _ in peer.backward([((0, peer.layout.size),)]):
            pass
        q = peer.grads - state["x"] * nu - state["y_slow"]
        await peer.apply_update()
        state["x"].sub_(q, alpha=1 / (4 * big))
        state["x_slow"].sub_(q, alpha=1 / (4 * math.sqrt(nu * big)))
        state["y_slow"].add_(q, alpha=math.sqrt(nu / big) / 4 + 1)
        peer.params.copy_(state["x"])

    async def _meet(self, peer: Peer, state: dict[str, Tensor], meeting: Meeting, slow: float) -> None:
        own, other = state["y"] + state["z"], meeting.other
        sent = self.codec.round_trip(own)
        links = both_ways((other,))
        heard = await exchange(peer, links, own, self.codec, channel=meeting.channel, round_=meeting.round)
        if heard:
            pull(state["z"], sent, heard, {other: 0.5})
            pull(state["z_slow"], sent, heard, {other: 2 * slow * math.sqrt(2 * self.smoothness / self.convexity)})

    def _flow(self, state: dict[str, Tensor], elapsed: float) -> None:
        """Run the continuous part: one exact step of a linear system, the same for every element."""
        matrix = torch.linalg.matrix_exp(self.generator() * elapsed).tolist()
        values = [state[name].clone() for name in STATE]
        for name, row in zip(STATE, matrix, strict=True):
            state[name].zero_()
            for weight, value in zip(row, values, strict=True):
                if weight:
                    state[name].add_(value, alpha=weight)

    def generator(self) -> Tensor:
        """Return A of d(x, x~, y, y~, z, z~) = A (x, ...) dt, [6, 6] float64."""
        ratio = self.convexity / 2 / self.smoothness
        eta, alpha, theta = math.sqrt(ratio) / 8, math.sqrt(ratio) / 4, 1 / (2 * math.sqrt(ratio))
        rows = [
            [-eta, eta, 0, 0, 0, 0],
            [eta, -eta, 0, 0, 0, 0],
            [0, 0, -alpha, alpha, 0, 0],
            [0, -theta * self.convexity / 2, -theta, 0, -theta, 0],
            [0, 0, 0, 0, -alpha, alpha],
            [0, 0, 0, 0, eta, -eta],
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _least_rate(self, graph: Clocks) -> float:
        return math.sqrt(2 * graph.slow * graph.resistance)


@functools.lru_cache(maxsize=8)
def _horizon(seed: int, cohort: Members, steps: int) -> float:
    """Return the time of the last gradient of all, 0 if no steps are left."""
    return max((arrivals(seed, worker, steps)[-1] for worker in cohort if steps), default=0.0)
