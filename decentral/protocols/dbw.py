"""Dynamic backup workers: a synchronous server that waits for the quickest k pushes, and chooses k as it goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from decentral.protocols.hosting import Push
from decentral.protocols.merge import mean
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.server import Server
from decentral.protocols.server_rule import LocalStepsRule

ROUNDS_KEPT = 5
"""Rounds over which what is known of gradients is averaged (D)."""


class DynamicBackupWorkers(LocalStepsRule):
    """A round takes the first k pushes; later ones are dropped, and their workers go on from the newest model.

        model <- model - eta gbar,   gbar the mean of k pushes;   V = sum_j |g_j - gbar|^2 / (k - 1)
        N = |gbar|^2 - V / k;   gain(k) = (eta - L eta^2 / 2) N - (L eta^2 / 2) V / k
        k <- argmax_k gain(k) / time(k),   all workers if there is no gain

    Xu et al., arXiv 2004.14696, from memory of the paper. A push is the change of H local steps. There the curvature L
    comes from the workers' losses; here, where losses do not travel, from how the mean turns: on a quadratic
    E<gbar', gbar> = N - eta L |gbar|^2. time(k), of the k-th push since the round began, is a running mean over rounds
    after one of as many pushes (over all rounds, where there was none), and does not fall as k grows; there it is a fit
    to all rounds. A k that has never been waited for is not chosen. A single push shows no variance: V is then that of
    the rounds before. Made for workers with alike data, for the quickest are heard most.
    """

    name = "dbw"
    period: FixedPeriod = 1
    lr: float = Field(default=1.0, gt=0)
    """Server learning rate (eta)."""

    async def serve(self, server: Server) -> None:
        known = _Known(self.lr)
        quorum, before = len(server.peer.members), 0
        while True:
            pushes: list[Push] = []
            began_s = server.peer.now()
            while len(pushes) < quorum and (push := await server.push()) is not None:
                if push.staleness:
                    server.dispatch(push.worker, self.period)
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
                server.dispatch(push.worker, self.period)
            if isinstance(gradient, Tensor):  # phantoms say nothing of themselves: wait for all
                known.saw(gradient, [push.values for push in pushes])
                quorum = known.quorum(before)


class _Known:
    """What rounds have shown of gradients and of times."""

    def __init__(self, lr: float) -> None:
        self._lr = lr
        self._rounds: deque[tuple[float, float, float]] = deque(maxlen=ROUNDS_KEPT)  # N, V, L
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
        curvature = self._rounds[-1][2] if self._rounds else 0.0
        if self._last is not None and (before := float(self._last[0] @ self._last[0])) > 0:
            curvature = (self._last[1] - float(gradient @ self._last[0])) / (self._lr * before)
        self._rounds.append((norm, variance, max(curvature, 0.0)))
        self._last = (gradient, norm)

    def quorum(self, before: int) -> int:
        """Return how many pushes the round after one of `before` waits for."""
        norm, variance, curvature = (sum(column) / len(self._rounds) for column in zip(*self._rounds, strict=True))
        half = curvature * self._lr**2 / 2
        counts = range(1, max(self._time_s)[0] + 1)
        gains = [(self._lr - half) * norm - half * variance / count for count in counts]
        times_s = [self._time_s.get((count, before), self._time_s[count, 0]) for count in counts]
        return best_quorum(gains, times_s)


def best_quorum(gains: Sequence[float], times_s: Sequence[float]) -> int:
    """Return the k in 1 .. n with the most gain a second, all n if none gains; on a tie the largest.

    `gains[k - 1]` and `times_s[k - 1]` are those of a round of k pushes; a time counts as at least that of fewer.
    """
    if max(gains) <= 0:
        return len(gains)
    best, best_rate, time_s = len(gains), 0.0, 0.0
    for count, (gain, seconds) in enumerate(zip(gains, times_s, strict=True), start=1):
        time_s = max(time_s, seconds)
        rate = gain / max(time_s, 1e-9)
        if rate >= best_rate:
            best, best_rate = count, rate
    return best
