"""Rounds of rules whose workers push sums of several gradients, from which a server gets the sum of all."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.gradient_codes import Job, code_matrix
from decentral.protocols.hosting import Push
from decentral.protocols.outer import Outer, OuterSGD
from decentral.protocols.server import Server
from decentral.protocols.server_rule import ServerRule
from decentral.replica import BatchId


class CodedRounds(ServerRule):
    """In each round a job begins, the gradient of a model, which is due `delay` rounds later.

    The server alone takes optimiser steps; the run's inner optimiser has no part. Rounds that a worker has missed count
    as its steps.
    """

    unaccountable = "a worker computes gradients of other workers' batches"
    needs_whole_model = "a worker computes gradients of other workers' batches"
    needs_task = "it asks for gradients of other workers' batches"
    stragglers: int = Field(default=1, ge=0)
    """Workers that nobody waits for (s); each worker computes s + 1 gradients."""
    outer: Outer = OuterSGD(lr=0.1)
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

    async def add_gradient(self, peer: Peer, total: Tensor, batch: BatchId, weight: float) -> None:
        """Add `weight` times the gradient of a batch at our parameters to `total` `[P]`."""
        async for _ in peer.backward([((0, peer.layout.size),)], batch):
            total.add_(peer.grads, alpha=weight)

    async def count_steps(self, peer: Peer, until: int) -> None:
        """Count local steps up to `until`. The parameters come from the server afterwards."""
        while peer.steps_left and peer.step < until:
            await peer.apply_update()

    async def serve(self, server: Server) -> None:
        jobs: dict[int, Any] = {}
        waiting: list[int] = []
        momentum = server.slot("momentum")
        for number in self.rounds(server):
            jobs[number] = self.new_job(server, number)
            for worker in waiting:
                self.assign(server, jobs, worker)
            due = jobs.get(number - self.delay)
            waiting = await self._round(server, jobs, due)
            gradient = due.mean() if due is not None else None
            self.advance(server, gradient, momentum)
            server.updated(list(due.came) if due else waiting, "skipped" if gradient is None else "committed")
            jobs.pop(number - self.delay, None)
        for worker in waiting:
            self.assign(server, jobs, worker)
        while (push := await server.push()) is not None:  # stragglers have a last step to do
            self.assign(server, jobs, push.worker)

    async def _round(self, server: Server, jobs: dict[int, Any], due: Any) -> list[int]:
        """Take pushes until the round is over; return the workers that wait for the next one."""
        waiting: list[int] = []
        began_s, until_s = server.peer.now(), math.inf
        while True:
            summed = due is None or due.complete
            if not summed:
                self.repeat(server, jobs, waiting)
            if not server.expected or (summed and server.peer.now() >= until_s):
                return sorted(waiting)
            push = await server.push(until_s if summed else math.inf)
            if push is None:
                continue
            self.take(jobs, push)
            if push.staleness:
                self.assign(server, jobs, push.worker)
            else:
                waiting.append(push.worker)
                until_s = min(until_s, began_s + (1 + self.wait) * push.elapsed_s)

    def rounds(self, server: Server) -> range:
        """Return the numbers of the rounds, and of the jobs that begin with them, which are left to this server."""
        first = server.began + 1
        return range(first, first + server.peer.steps_left + self.delay)

    def new_job(self, server: Server, number: int) -> Any:
        """Return job `number`, at the server's model as it is: it has `came`, by worker, `complete` and `mean`."""
        return Job(server.peer.cohort, server.model.clone() if self.delay else server.model, self.code(server.peer))

    def take(self, jobs: dict[int, Any], push: Push) -> None:
        """Note what a push brings, for as long as its job is not summed."""
        if push.assigned in jobs:
            jobs[push.assigned].came[push.worker] = push.values

    def repeat(self, server: Server, jobs: dict[int, Any], waiting: list[int]) -> None:
        """Send workers out of `waiting` out again, if the sum that is due cannot come without them."""

    def advance(self, server: Server, gradient: Tensor | None, momentum: Tensor) -> None:
        """Change the server's model by the mean gradient, if there is one."""
        if gradient is not None:
            self.outer.step(server.model, gradient, momentum)

    def assign(self, server: Server, jobs: dict[int, Any], worker: int) -> None:
        """Send a worker out for the round's own job."""
        server.dispatch(worker, self.next_assignment(server, worker))

    def code(self, peer: Peer) -> Tensor:
        """Return B, [n, n] float64: how much of each worker's gradient is in each worker's push."""
        workers = len(peer.cohort)
        return code_matrix(workers, self.tolerated(workers), peer.seed)
