"""M-SGC: most gradients are computed once, later rounds make up for what did not come, and little is coded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import UNCLAIMED_MODELS, Peer
from decentral.protocols.gradient_codes import Job
from decentral.protocols.hosting import Push
from decentral.protocols.interleaved_jobs import InterleavedJob, Pieces, packed, unpacked
from decentral.protocols.server import Server
from decentral.protocols.sr_sgc import SequentialCoding


class MSGC(SequentialCoding):
    """A job takes W - 1 + B rounds; in each round a worker does a piece of each of that many jobs.

        round t + j, of job t, T = W - 2 + B:
          j < W - 1       the sum of lambda + 1 gradients of our own
          j = W - 1 + b   the first of these sums that has not come, again; else a coded gradient of group b
        model_(t+T+1) <- outer(model_(t+T), mean gradient of job t at model_t)

    The scheme M-SGC (multiplexed, diagonally interleaved) of arXiv 2211.13802, from its authors' simulator. A group is
    one gradient of each worker, in a code that lambda workers may be missing from. A job is worth
    (W - 1)(lambda + 1) + B local steps of each worker, and a worker computes `load` of it in a round. With lambda = n
    nothing is coded and a sum is of one gradient. Stragglers as the model has them leave the sum complete when it is
    due; after others, workers do again what it lacks, before the round ends. There T + 1 models are trained side by
    side; here gradients are T updates old. A push carries a vector of each of T + 1 jobs, a pull their models. Own
    pieces of a worker that has gone are left out of the mean; with more than lambda gone every round is skipped.
    """

    name = "m_sgc"

    @property
    def delay(self) -> int:
        return self.window - 2 + self.burst

    @property
    def vectors(self) -> int:
        return self.delay + 1

    def tolerated(self, workers: int) -> int:
        return min(self.stragglers, workers - 1)

    def pieces(self, workers: int) -> Pieces:
        """Return how a job of so many workers is cut."""
        size, groups = (self.stragglers + 1, self.burst) if self.stragglers < workers else (1, 0)
        return Pieces(workers, self.window - 1, size, groups)

    def load(self, workers: int) -> float:
        """Return the share of a job's gradients that a worker computes in a round."""
        pieces = self.pieces(workers)
        return pieces.size * self.vectors / (workers * pieces.span)

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.burst >= self.window:
            raise ConfigError(
                f"rule.burst: {self.burst} rounds are no less than the window of {self.window}, so a worker might "
                "always be a straggler; take a longer window"
            )
        if self.vectors > UNCLAIMED_MODELS:
            raise ConfigError(
                f"rule.window: with window {self.window} and burst {self.burst} a push carries {self.vectors} vectors; "
                f"window - 1 + burst may be {UNCLAIMED_MODELS} at most"
            )

    def first_assignment(self) -> int:
        return packed(1, range(self.vectors))

    def next_assignment(self, server: Server, worker: int) -> int:
        return packed(self.rounds(server)[0] + server.version, range(self.vectors))

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        """Do the pieces of a round, each at its job's model."""
        if not peer.steps_left:
            return None
        number, plan = unpacked(assigned, self.vectors)
        pieces, total, push = self.pieces(len(peer.cohort)), peer.step + peer.steps_left, torch.zeros_like(anchor)
        for slot, piece in enumerate(plan):
            if piece is not None and number > slot:
                part = self._part(anchor, slot)
                peer.params.copy_(anchor[part])
                for batch, weight in pieces.batches(peer.cohort, peer.id, number - slot, piece, self.code(peer)):
                    if batch.step < total:
                        await self.add_gradient(peer, push[part], batch, weight)
        over = number > math.ceil(total / pieces.span) + self.delay
        peer.miss(min((number - 1) * pieces.span, total - 1) - peer.step)
        await self.count_steps(peer, total if over else min(number * pieces.span, total - 1))
        return push

    def rounds(self, server: Server) -> range:
        span = self.pieces(len(server.peer.cohort)).span
        total = server.peer.step + server.peer.steps_left
        return range(server.began // span + 1, math.ceil(total / span) + self.delay + 1)

    def new_job(self, server: Server, number: int) -> InterleavedJob:
        peer = server.peer
        pieces = self.pieces(len(peer.cohort))
        groups = [Job(peer.cohort, peer.params, self.code(peer)) for _ in range(pieces.groups)]
        return InterleavedJob(peer, pieces, peer.step + peer.steps_left - pieces.begin(number), groups)

    def take(self, jobs: dict[int, Any], push: Push) -> None:
        number, plan = unpacked(push.assigned, self.vectors)
        for slot, piece in enumerate(plan):
            if piece is not None and number - slot in jobs:
                jobs[number - slot].take(push.worker, piece, push.values[self._part(push.values, slot)])

    def assign(self, server: Server, jobs: dict[int, Any], worker: int) -> None:
        """Send a worker out for its pieces of all jobs of the round."""
        number, plan = unpacked(self.next_assignment(server, worker), self.vectors)
        for slot in range(self.vectors):
            job = jobs.get(number - slot)
            plan[slot] = None if job is None else job.due_in(slot, worker)
        server.dispatch(worker, packed(number, plan))

    def repeat(self, server: Server, jobs: dict[int, Any], waiting: list[int]) -> None:
        number, idle = max(jobs), not server.expected
        for worker in sorted(waiting):
            piece = jobs[number - self.delay].wanted(worker, coded=idle)
            if piece is not None:
                waiting.remove(worker)
                server.dispatch(worker, packed(number, [*[None] * self.delay, piece]))

    def advance(self, server: Server, gradient: Tensor | None, momentum: Tensor) -> None:
        newest = server.model[self._part(server.model, 0)].clone()
        if gradient is not None:
            self.outer.step(newest, gradient, momentum)
        server.model.copy_(torch.cat([server.model[len(newest) :], newest]))

    def _part(self, vectors: Tensor, slot: int) -> slice:
        """Return where the job of a slot has its vector among all, `[(T + 1) P]`: the newest is the last."""
        size = len(vectors) // self.vectors
        return slice((self.delay - slot) * size, (self.vectors - slot) * size)
