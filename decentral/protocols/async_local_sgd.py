"""Asynchronous local SGD: workers of unequal speed push when they are ready; a delayed Nesterov step takes them up."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import Field

from decentral.errors import ConfigError
from decentral.protocols.hosting import Push
from decentral.protocols.server import Server
from decentral.protocols.server_rule import LocalStepsRule


class AsyncRule(LocalStepsRule):
    """Workers push as they finish; those that finish within a grace of the first one go on from the same model.

    Liu et al., arXiv 2401.09135, section 4. With `dylu` (dynamic local updates) a worker does floor(H v_i / max_j v_j)
    local steps, v its speed, so that all finish at about the same time; in its first phase it does H. Speeds are what
    the server has seen of each worker, transfers included, mostly in its last phase.
    """

    newcomers = "at once"
    grace_s: float = Field(default=0.5, ge=0)
    """Seconds after the first push in which others may join it; infinite: everybody waits for everybody."""
    dylu: bool = True
    """Fit local steps to the worker's speed."""

    async def arrivals(self, server: Server) -> AsyncIterator[Push]:
        """Yield pushes as they come; send their workers out again when the grace of the first one is over."""
        while (push := await server.push()) is not None:
            deadline_s, together = server.peer.now() + self.grace_s, []
            while push is not None:
                yield push
                together.append(push.worker)
                push = await server.push(deadline_s)
            for worker in together:
                server.dispatch(worker, self.next_assignment(server, worker))

    def next_assignment(self, server: Server, worker: int) -> int:
        if not self.dylu or worker not in server.step_s:
            return self.period
        return max(1, int(self.period * min(server.step_s.values()) / server.step_s[worker] + 1e-9))


class AsyncLocalSGD(AsyncRule):
    """Outer Nesterov for pushes that come one by one: each moves the model, but every N-th alone moves the momentum.

        Delta <- Delta + g                                                      (g = model at dispatch - theta_i)
        every N-th push:  m <- beta m + Delta / N;   Delta <- 0;   model <- model - lr [(1 - c N + c) beta m + g / N]
        the others:                                                model <- model - lr [c beta m + g / N]

    Delayed Nesterov, Liu et al., arXiv 2401.09135, algorithm 3. Over N pushes the model moves by one Nesterov step on
    their mean; with N the workers, equal speeds and a grace that covers the transfers it is DiLoCo. A Nesterov step at
    every push (N = 1) diverges from that even without staleness.
    """

    name = "async_local_sgd"
    delay: int | None = Field(default=None, ge=1)
    """Pushes between two changes of the momentum (N); unset: as many as workers."""
    lr: float = Field(default=0.7, gt=0)
    """Outer learning rate (epsilon)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """beta."""
    spread: float = Field(default=0.0, ge=0)
    """Share of the momentum that every push takes along (c), at most 1 / N."""

    def check(self, workers: int) -> None:
        super().check(workers)
        delay = self.delay or workers
        if self.spread > 1 / delay:
            raise ConfigError(
                f"rule.spread: {self.spread:g} is more than one push's share of the momentum; with {delay} pushes to a "
                f"change of it, at most {1 / delay:.4g}"
            )

    async def serve(self, server: Server) -> None:
        momentum, pushed = server.slot("momentum"), server.slot("pushed")
        delay = self.delay or len(server.peer.cohort)
        async for push in self.arrivals(server):
            share = self.spread
            pushed.add_(push.values)
            if (server.version + 1) % delay == 0:
                momentum.mul_(self.momentum).add_(pushed, alpha=1 / delay)
                pushed.zero_()
                share = 1 - self.spread * delay + self.spread
            server.model.sub_(push.values, alpha=self.lr / delay).sub_(momentum, alpha=self.lr * share * self.momentum)
            server.updated([push.worker])
