"""Gradient coding: each worker computes several workers' gradients, so that nobody waits for stragglers."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.gradient_codes import Job, code_matrix
from decentral.protocols.merge import OuterField, OuterSGD
from decentral.protocols.server import Server
from decentral.protocols.server_rule import ServerRule
from decentral.replica import BatchId


class GradientCoding(ServerRule):
    """Worker i sends a sum of s + 1 workers' gradients, and any n - s of these give the mean gradient of all n.

        push_i = sum_j B_ij g_j;   a' B_I = (1, ..., 1) for the pushes I that came
        model <- outer(model, a' push_I / n)

    Tandon et al., arXiv 1612.03301. Groups of s + 1 workers compute the same gradients (fractional repetition). If
    s + 1 does not divide n, worker i of the last group, of up to 2 s + 1, computes g_i to g_(i + s), and there H B' = 0
    for a random H whose rows sum to zero. In the paper that group is then all workers, and the weights grow with it,
    and rounding errors with them. g_j is the gradient of the batch that worker j would train on. A round ends as soon
    as its pushes give the sum; a late push is dropped, and rounds that a worker has missed count as its steps. The
    server alone takes optimiser steps; the run's inner optimiser has no part. With more than s workers gone every round
    is skipped.

    A subclass may let the sum be due some rounds later.
    """

    name = "gradient_coding"
    stragglers: int = Field(default=1, ge=0)
    """Workers that nobody waits for (s); each worker computes s + 1 gradients."""
    outer: OuterField = OuterSGD(lr=0.1)
    """What the server makes of a mean gradient."""

    @property
    def delay(self) -> int:
        """Rounds that may pass until a gradient is summed (B)."""
        return 0

    @property
    def wait(self) -> float:
        """A round goes on for so many times the time of its quickest worker more (mu)."""
        return 0.0

    def tolerated(self, workers: int) -> int:
        """Return s."""
        return self.stragglers

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.tolerated(workers) >= workers:
            raise ConfigError(
                f"rule.stragglers: {self.tolerated(workers)} of {workers} workers cannot all be stragglers; at most "
                f"{workers - 1} can"
            )
        if self.codec.loss not in ("none", "rounding"):
            raise ConfigError(
                f"rule.codec: '{self.codec.spelling()}' leaves much of a vector out, and a sum of what is left decodes "
                "to nothing; choose a codec that keeps every element, such as 'bf16' or 'int8'"
            )

    def first_assignment(self) -> int:
        return 1

    def next_assignment(self, server: Server, worker: int) -> int:
        return server.began + server.version + 1

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        """Compute this worker's coded gradient of job `assigned`."""
        while peer.steps_left > 1 and peer.step < assigned - 1:
            peer.grads.zero_()
            await peer.apply_update()
        if not peer.steps_left:
            return None
        coded = torch.zeros_like(peer.params)
        for worker, weight in zip(peer.cohort, self.code(peer)[peer.cohort.rank(peer.id)].tolist(), strict=True):
            if weight:
                async for _ in peer.backward([((0, peer.layout.size),)], BatchId(worker, assigned - 1)):
                    coded.add_(peer.grads, alpha=weight)
        await peer.apply_update()  # which counts the step; the parameters come from the server
        return coded

    async def serve(self, server: Server) -> None:
        jobs: dict[int, Job] = {}
        first, momentum = server.began + 1, server.peer.slot("momentum")
        for number in range(first, first + server.peer.steps_left + self.delay):
            jobs[number] = Job(server.peer.cohort, server.model.clone() if self.delay else server.model)
            due = jobs.get(number - self.delay)
            waiting = await self._round(server, jobs, due)
            gradient = due.mean(self.code(server.peer)) if due is not None else None
            if gradient is not None:
                self.outer.step(server.model, gradient, momentum)
            server.updated(list(due.came) if due else waiting, "skipped" if gradient is None else "committed")
            jobs.pop(number - self.delay, None)
            for worker in waiting:
                self._assign(server, jobs, worker)
        while (push := await server.push()) is not None:  # stragglers have a last step to do
            self._assign(server, jobs, push.worker)

    async def _round(self, server: Server, jobs: dict[int, Job], due: Job | None) -> list[int]:
        """Take pushes until the round is over; return the workers that wait for the next one."""
        waiting: list[int] = []
        began_s, until_s = server.peer.now(), math.inf
        code = self.code(server.peer)
        while server.expected:
            summed = due is None or due.weights(code) is not None
            if summed and server.peer.now() >= until_s:
                break
            push = await server.push(until_s if summed else math.inf)
            if push is None:
                continue
            if push.assigned in jobs:
                jobs[push.assigned].came[push.worker] = push.values
            if push.staleness:
                self._assign(server, jobs, push.worker)
            else:
                waiting.append(push.worker)
                until_s = min(until_s, began_s + (1 + self.wait) * push.elapsed_s)
        return sorted(waiting)

    def _assign(self, server: Server, jobs: dict[int, Job], worker: int) -> None:
        """Send a worker out: to do a job again whose sum is due and lacks pushes, or for the round's own job."""
        number = self.next_assignment(server, worker)
        due = jobs.get(number - self.delay) if self.delay else None
        if due is not None and worker not in due.came:
            coming = sum(assigned == number - self.delay for assigned in server.assigned.values())
            if len(due.came) + coming < len(server.peer.cohort) - self.tolerated(len(server.peer.cohort)):
                server.dispatch(worker, number - self.delay, due.model)
                return
        server.dispatch(worker, number)

    def code(self, peer: Peer) -> Tensor:
        """Return B, [n, n] float64: how much of each worker's gradient is in each worker's push."""
        workers = len(peer.cohort)
        return code_matrix(workers, self.tolerated(workers), peer.seed)
