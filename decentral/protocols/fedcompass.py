"""FedCompass: the server gives each worker so many local steps that groups of workers arrive together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pydantic import Field

from decentral.protocols.hosting import Push
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.server import Server
from decentral.protocols.server_rule import LocalStepsRule


@dataclass(slots=True, eq=False)
class Group:
    """Workers that are to arrive at `due_s` and are waited for until `latest_s`, in seconds of the server's clock."""

    due_s: float
    latest_s: float
    out: set[int]
    arrived: list[Push] = field(default_factory=list)


class FedCompass(LocalStepsRule):
    """A worker joins the group that it can meet with the most local steps, or begins one.

        join:  Q = floor((due - now) / t_i), t_i its seconds a step; among open groups with Qmin <= Q <= Qmax the most
        begin: Q the most, over open groups, of floor((latest + Qmax t_fastest - now) / t_i) up to Qmax, so that the
               members of that group can meet it next time, at least Qmin; Qmax if there is none
               due = now + Q t_i;  latest = now + lambda Q t_i
        a group is complete, or `latest` has come:  model <- model - sum_i (alpha / n) (1 + s_i)^-a Delta_i

    Li et al., arXiv 2309.14675, as its authors' framework has it, with n the workers and s_i the staleness. A push
    after `latest` waits for the next update and its worker goes on at once. The first phase of every worker is Qmin
    (there: Qmax), which tells its speed, and its first push an update by itself. Seconds a step include the transfers.
    """

    name = "fedcompass"
    needs_whole_model = "each worker has as many local steps as fit its own speed"
    newcomers = "at once"
    period: FixedPeriod = 100
    """Most local steps before a push (Qmax)."""
    ratio: float = Field(default=5.0, ge=1)
    """How many times more that is than the fewest (Qmax / Qmin); with 1 it is a buffered asynchronous server."""
    patience: float = Field(default=1.5, ge=1)
    """How many times as long as planned a group is waited for (lambda)."""
    alpha: float = Field(default=0.9, gt=0)
    """Server learning rate."""
    discount: float = Field(default=0.5, ge=0)
    """How fast a stale push loses weight (a)."""

    @property
    def shortest(self) -> int:
        """Fewest local steps before a push (Qmin)."""
        return math.ceil(self.period / self.ratio)

    def first_assignment(self) -> int:
        return self.shortest

    async def serve(self, server: Server) -> None:
        groups: list[Group] = []
        late: set[int] = set()  # workers whose group has gone on without them
        kept: list[Push] = []  # their pushes, which count in the next update
        while True:
            push = await server.push(min((group.latest_s for group in groups), default=math.inf))
            if push is not None:
                mine = next((group for group in groups if push.worker in group.out), None)
                if mine is not None:
                    mine.out.discard(push.worker)
                    mine.arrived.append(push)
                elif push.worker in late:
                    late.discard(push.worker)
                    kept.append(push)
                    self._assign(server, groups, push.worker)
                else:
                    self._update(server, [push])
                    self._assign(server, groups, push.worker)
            elif not groups:
                break
            expected = server.expected
            for group in [each for each in groups if not each.out & expected or each.latest_s <= server.peer.now()]:
                groups.remove(group)
                late |= group.out
                if group.arrived:
                    self._update(server, [*group.arrived, *kept])
                    kept.clear()
                for each in sorted(group.arrived, key=lambda each: server.step_s[each.worker]):
                    self._assign(server, groups, each.worker)
        if kept:
            self._update(server, kept)

    def _update(self, server: Server, pushes: list[Push]) -> None:
        for push in sorted(pushes, key=lambda push: push.worker):
            staleness = server.version - push.version  # a push may have waited while others were taken up
            share = self.alpha * (1 + staleness) ** -self.discount / len(server.peer.cohort)
            server.model.sub_(push.values, alpha=share)
        server.updated([push.worker for push in pushes])

    def _assign(self, server: Server, groups: list[Group], worker: int) -> None:
        """Find the worker a group, or begin one with it, and send it out, if it has steps left."""
        if not server.left(worker):
            return
        now, step_s = server.peer.now(), server.step_s
        if worker not in step_s:
            server.dispatch(worker, self.shortest)
            return
        steps, group = self.fitting(groups, now, step_s[worker])
        if group is None:
            steps = self.leading(groups, now, worker, step_s)
            planned_s = steps * step_s[worker]
            group = Group(now + planned_s, now + self.patience * planned_s, set())
            groups.append(group)
        group.out.add(worker)
        server.dispatch(worker, steps)

    def fitting(self, groups: list[Group], now: float, step_s: float) -> tuple[int, Group | None]:
        """Return the most local steps after which a worker of `step_s` seconds a step meets an open group, and which.

        None if it meets none with Qmin to Qmax steps.
        """
        best: tuple[int, Group | None] = (0, None)
        for group in groups:
            steps = int((group.due_s - now) / step_s + 1e-9)
            if self.shortest <= steps <= self.period and steps > best[0]:
                best = (steps, group)
        return best

    def leading(self, groups: list[Group], now: float, worker: int, step_s: dict[int, float]) -> int:
        """Return the local steps of a worker that begins a group, to be met by those of open groups next time."""
        steps = []
        for group in groups:
            members = [*group.out, *(push.worker for push in group.arrived)]
            fastest = min(step_s[member] for member in members)
            steps.append(int((group.latest_s + self.period * fastest - now) / step_s[worker]))
        most = max((each for each in steps if each <= self.period), default=self.period)
        return max(self.shortest, most)
