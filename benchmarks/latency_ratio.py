"""What averaging with everybody costs over averaging in pairs when message times vary: NoLoCo's latency model.

    python -m benchmarks.latency_ratio      (about ten minutes)

Prints the ratio of expected times, tree all-reduce over pair averaging, for n workers and log-normal message times,
beside the published one (as reproduced from the recipe of NoLoCo, arXiv 2506.10911). There the n workers are the leaves
of a binary tree: a parent waits for the slower of two messages, log2(n) times up, and the mean goes down the same way;
a pair is the tree of two leaves. So n leaves are 2 n - 1 members of `tree_mean` here, whose messages a timing-only
simulation really sends, a round every `GAP_S` so that none meets another.

The second line of each n is what this package's own messages come to, from fewer rounds: its tree has no nodes but the
n workers, and its pairs exchange what they have and then say that they heard it. Figures are means over seeds, with the
standard error that their spread says.
"""

from __future__ import annotations

import asyncio
import functools
import math
import statistics
from typing import Literal

from decentral.config import validated
from decentral.journal import Synced
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.protocols.codecs import Float32
from decentral.protocols.collectives import Attempt, exchange, tree_mean
from decentral.protocols.topology import Links
from decentral.sim.simulate import simulate

SIZES = (4, 16, 64, 256, 1024)
DEVIATIONS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
"""Standard deviation of a message's time over its mean."""
PUBLISHED = {
    4: (2.0, 2.1, 2.25, 2.34, 2.37, 2.41),
    16: (4.0, 4.5, 5.2, 5.9, 6.5, 6.8),
    64: (6.0, 7.1, 8.7, 10.5, 12.3, 13.8),
    256: (8.0, 9.7, 12.5, 16.4, 20.4, 24.0),
    1024: (10.0, 12.4, 17.0, 23.3, 31.1, 39.5),
}
GAP_S = 1e6
"""Between two rounds; a message takes 1 s on average."""
SEEDS = 5
ROUNDS = {4: 200, 16: 100, 64: 50, 256: 30, 1024: 20}
"""Rounds of each seed at a deviation of 1, for a standard error of 1 to 2 %; they grow with its square."""
PAIR_ROUNDS = 1600
OWN_SHARE = 1 / 4
"""Share of the rounds for the second lines."""


class Averaging(SyncRule):
    """Rounds of averaging and nothing else, each begun by all members at once."""

    name = "averaging"
    rounds: int
    way: Literal["tree", "pair"]
    """With everybody, or member 0 with member 1."""

    async def run(self, peer: Peer) -> None:
        for round_ in range(1, self.rounds + 1):
            await self._wait_for(peer, round_)
            if self.way == "tree":
                await tree_mean(peer, peer.params, Float32(), Attempt(peer.members, "tree", round_))
                peer.ended_round("tree", round_, "committed", peer.members.ids)
            else:
                other = 1 - peer.id
                await exchange(peer, Links(to=(other,), source=(other,)), peer.params, Float32(), round_=round_)
        await self._wait_for(peer, self.rounds + 1)  # whoever leaves, leaves the last round of all others

    async def _wait_for(self, peer: Peer, round_: int) -> None:
        await asyncio.sleep(round_ * GAP_S - peer.now())


@functools.cache
def mean_time_s(way: str, members: int, deviation: float, rounds: int, seed: int) -> float:
    """Return how long a round takes until its last member has the mean, on average."""
    table = {
        "seed": seed,
        "task": {"name": "quadratic", "dimension": 1, "curvature": [1.0]},
        "rule": {"name": "benchmarks.latency_ratio:Averaging", "rounds": rounds, "way": way},
        "patience_s": GAP_S,
        "fleet": {
            "workers": [{"count": members}],
            "up_bps": 1e15,
            "down_bps": 1e15,
            "network": {"links": [{"latency_s": 1.0, "jitter_s": deviation}]},
        },
    }
    ended: dict[int, float] = {}
    for record in simulate(validated(table, "benchmark"), timing_only=True).records:
        if isinstance(record, Synced):
            ended[record.round] = max(record.time_s, ended.get(record.round, 0.0))
    return statistics.fmean(time_s - round_ * GAP_S for round_, time_s in ended.items())


def times_s(way: str, members: int, deviation: float, rounds: float) -> list[float]:
    """Return the mean time of a round for each seed; `rounds` are those at a deviation of 1."""
    count = max(1, round(rounds * deviation**2))
    return [mean_time_s(way, members, deviation, count, seed) for seed in range(SEEDS)]


def ratio(over: list[float], under: list[float]) -> tuple[float, float]:
    """Return the ratio of two means over seeds, and its standard error."""
    top, bottom = statistics.fmean(over), statistics.fmean(under)
    relative = [statistics.stdev(times) / statistics.fmean(times) for times in (over, under)]
    return top / bottom, top / bottom * math.hypot(*relative) / math.sqrt(SEEDS)


def as_published(workers: int, deviation: float) -> tuple[float, float]:
    """Return the ratio with workers at the leaves, and its standard error."""
    tree = times_s("tree", 2 * workers - 1, deviation, ROUNDS[workers])
    return ratio(tree, times_s("tree", 3, deviation, PAIR_ROUNDS))


def as_sent(workers: int, deviation: float) -> tuple[float, float]:
    """Return the ratio of what the rules of this package send, and its standard error."""
    tree = times_s("tree", workers, deviation, OWN_SHARE * ROUNDS[workers])
    return ratio(tree, times_s("pair", 2, deviation, OWN_SHARE * PAIR_ROUNDS))


def main() -> None:
    """Print the table."""
    print("std / mean of a message's time   " + "".join(f"{deviation:<24}" for deviation in DEVIATIONS))
    worst = 0.0
    for workers in SIZES:
        cells = []
        for deviation, published in zip(DEVIATIONS, PUBLISHED[workers], strict=True):
            ours, error = as_published(workers, deviation)
            worst = max(worst, abs(ours / published - 1))
            cells.append(f"{ours:5.2f} +-{error:4.2f} /{published:5.2f} ={ours / published:5.2f}")
        print(f"n = {workers:<5} ours / published  " + " ".join(cells), flush=True)
        own = [as_sent(workers, deviation) for deviation in DEVIATIONS]
        print(f"{'as sent by our rules':>27}  " + "".join(f"{each:5.2f} +-{error:4.2f}{'':12}" for each, error in own))
    print(f"largest difference from the published: {worst:.1%}")


if __name__ == "__main__":
    main()
