"""Dynamic backup workers: a synchronous server that waits for the quickest k pushes, and chooses k as it goes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.hosting import Push
from decentral.protocols.merge import mean
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.server import Server
from decentral.protocols.server_rule import LocalStepsRule

ROUNDS_KEPT = 5
"""Rounds over which what is known of gradients is averaged (D)."""
AS_GOOD = 1e-3
"""Share of the best gain a second that may be missed to hear more workers: the server's own is always a bit ahead."""


class DynamicBackupWorkers(LocalStepsRule):
    """A round takes the first k pushes; later ones are dropped, and their workers go on from the newest model.

        model <- model - eta gbar,   gbar the mean of k pushes;   V = sum_j |g_j - gbar|^2 / (k - 1)
        N = |gbar|^2 - V / k;   gain(k) = (eta - L eta^2 / 2) N - (L eta^2 / 2) V / k
        k <- argmax_k gain(k) / time(k),   all workers if there is no gain

    Xu et al., arXiv 2004.14696, from memory of the paper. A push is the change of H local steps; eta is the same for
    every k. A round is H local steps for everybody: a worker that comes too late for some has missed these steps, and
    all end with the last round, so that nobody pushes alone when the others have done theirs. There the curvature L
    comes from the workers' losses; here, where losses do not travel, from how the mean turns: on a quadratic
    E<gbar', gbar> = N - eta L |gbar|^2. time(k), of the k-th push since the round began, is a running mean over rounds
    after one of as many pushes (over all rounds, where there was none), and does not fall as k grows; there it is a fit
    to all rounds. A k that has never been waited for is not chosen. A single push shows no variance: V is then that of
    the rounds before. Made for workers with alike data, for the quickest are heard most.
    """

    name = "dbw"
    unaccountable = "pushes that come too late are dropped"
    needs_whole_model = "who comes too late is told to begin the next step at once"
    needs_task = "who comes too late skips local steps"
    period: FixedPeriod = 1
    lr: float = Field(default=1.0, gt=0)
    """Server learning rate (eta)."""

    def first_assignment(self) -> int:
        """Return the number of a round's first local step, counted from 1."""
        return 1

    def next_assignment(self, server: Server, worker: int) -> int:
        return server.done + 1 if server.done < server.total else 0

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        peer.miss(assigned - 1 - peer.step)
        return await super().work(peer, anchor, self.period)

    async def serve(self, server: Server) -> None:
        known = _Known(self.lr)
        quorum, before = len(server.peer.members), 0
        while True:
            pushes: list[Push] = []
            began_s = server.peer.now()
            while len(pushes) < quorum and (push := await server.push()) is not None:
                if push.staleness:
                    server.dispatch(push.worker, self.next_assignment(server, push.worker))
                    continue
                pushes.append(push)
                known.took(len(pushes), before, server.peer.now() - began_s)
            if not pushes:
                return
            before = len(pushes)
            pushes.sort(key=lambda push: push.worker)
            gradient = mean([push.values for push in pushes])
            server.model.sub_(gradient, alpha=self.lr)
            server.updated([push.worker for push in pushes])
            for push in pushes:
                server.dispatch(push.worker, self.next_assignment(server, push.worker))
            if isinstance(gradient, Tensor):  # phantoms say nothing of themselves: wait for all
                known.saw(gradient, [push.values for push in pushes])
                quorum = known.quorum(before)


class _Known:
    """What rounds have shown of gradients and of times."""

    def __init__(self, lr: float) -> None:
        self._lr = lr
        self._rounds: deque[tuple[float, float]] = deque(maxlen=ROUNDS_KEPT)  # N, V
        self._curvatures: deque[float] = deque(maxlen=ROUNDS_KEPT)  # L, since the second round
        self._last: tuple[Tensor, float] | None = None  # gbar and its N
        self._time_s: dict[tuple[int, int], float] = {}  # by count, and count of the round before (0: whatever it was)

    def took(self, count: int, before: int, seconds: float) -> None:
        """The `count`-th push of a round after one of `before` has come so long after it began."""
        for key in {(count, before), (count, 0)}:
            known_s = self._time_s.get(key, seconds)
            self._time_s[key] = known_s + (seconds - known_s) / ROUNDS_KEPT

    def saw(self, gradient: Tensor, values: Sequence[Tensor]) -> None:
        """A round has come to the mean `gradient` `[P]` of these pushes."""
        count, square = len(values), float(gradient @ gradient)
        if count > 1:
            variance = sum(float((each - gradient).square().sum()) for each in values) / (count - 1)
        else:
            variance = self._rounds[-1][1] if self._rounds else 0.0
        norm = max(square - variance / count, 0.0)
        if self._last is not None and (before := float(self._last[0] @ self._last[0])) > 0:
            self._curvatures.append((self._last[1] - float(gradient @ self._last[0])) / (self._lr * before))
        self._rounds.append((norm, variance))
        self._last = (gradient, norm)

    def quorum(self, before: int) -> int:
        """Return how many pushes the round after one of `before` waits for."""
        norm, variance = (sum(column) / len(self._rounds) for column in zip(*self._rounds, strict=True))
        half = max(sum(self._curvatures) / max(len(self._curvatures), 1), 0.0) * self._lr**2 / 2
        counts = range(1, max(self._time_s)[0] + 1)
        gains = [(self._lr - half) * norm - half * variance / count for count in counts]
        times_s = [self._time_s.get((count, before), self._time_s[count, 0]) for count in counts]
        return best_quorum(gains, times_s)


def best_quorum(gains: Sequence[float], times_s: Sequence[float]) -> int:
    """Return the k in 1 .. n with the most gain a second, of those as good the largest; all n if none gains.

    `gains[k - 1]` and `times_s[k - 1]` are those of a round of k pushes; a time counts as at least that of fewer.
    """
    if max(gains) <= 0:
        return len(gains)
    at_least_s = itertools.accumulate(times_s, max)
    rates = [gain / max(seconds, 1e-9) for gain, seconds in zip(gains, at_least_s, strict=True)]
    enough = (1 - AS_GOOD) * max(rates)
    return max(count for count, rate in enumerate(rates, start=1) if rate >= enough)
