"""Speed of timing-only simulation: worker-rounds a second, records made, verified and counted.

Run from the repository's root (about two minutes; other work on the machine shows in the spread):

    python -m benchmarks.timing_only
    python -m benchmarks.timing_only noloco 10000 500           # one run alone, with its peak memory: 25,000 steps
    python -m benchmarks.timing_only noloco 10000 500 0.1       # the same with jitter
    python -m benchmarks.timing_only diloco 1000 500            # all-reduces

Prints the median of 3 runs with minimum and maximum. A worker-round is one local phase of one worker and the round of
talk after it. Gossip costs a worker-round the same however many workers there are, a butterfly all-reduce sends two
packets to every other member; rounds that are alike are worked out once. "messages" is NoLoCo as a run is simulated in
which somebody crashes or loses packets: by messages between coroutines. The last column is a fleet whose workers drift
apart (jitter 0.1): then nothing happens at the same instant, and all-reduce flows end one by one, each changing the
rates of all others.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

from decentral.config import Run, validated
from decentral.sim.simulate import simulate
from decentral.sim.watch import UNWATCHED, Watch

REPEATS = 3
PERIOD = 50
JITTER = 0.1
CASES = (  # rule, workers, rounds
    ("noloco", 100, 200),
    ("noloco", 1_000, 100),
    ("noloco", 10_000, 10),
    ("messages", 1_000, 20),
    ("ddp", 32, 20),
    ("ddp", 128, 2),
    ("diloco", 32, 20),
    ("diloco", 128, 2),
)


WATCHED = Watch(links=True)
"""What only messages can show."""


def make_run(rule: str, workers: int, rounds: int, jitter: float) -> Run:
    """Return a run of so many rounds: 16 parameters for gossip, 16,384 where every member owns a chunk of them."""
    gossip = rule == "noloco"
    fields: dict[str, Any] = {"name": rule} if rule == "ddp" else {"name": rule, "period": PERIOD}
    table = {
        "steps": rounds * (1 if rule == "ddp" else PERIOD),
        "task": {"name": "quadratic", "dimension": 16 if gossip else 16_384},
        "inner": {"name": "sgd", "lr": 0.1},
        "rule": fields,
        "fleet": {"workers": [{"count": workers}], "jitter": jitter},
    }
    return validated(table, "benchmark")


def seconds_of(run: Run, watch: Watch = UNWATCHED) -> float:
    """Return the wall-clock seconds of a simulation."""
    start = time.perf_counter()
    simulate(run, timing_only=True, watch=watch)
    return time.perf_counter() - start


def time_one(rule: str, workers: int, rounds: int, jitter: float = 0.0) -> None:
    """Print what one run takes."""
    seconds = seconds_of(make_run(rule, workers, rounds, jitter))
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = workers * rounds / seconds
    print(f"{rule}, {workers:,} workers, {rounds} rounds, jitter {jitter:g}: {seconds:.1f} s", end=", ")
    print(f"{rate:,.0f} worker-rounds/s, peak {peak_gib:.2f} GiB")


def main() -> None:
    """Print the table."""
    heads = f"{'rule':<8}{'workers':>8}{'rounds':>8}{'seconds':>9}{'(min to max)':>18}"
    print(f"{heads}{'worker-rounds/s':>17}{'jitter':>9}")
    for name, workers, rounds in CASES:
        rule, watch = ("noloco", WATCHED) if name == "messages" else (name, UNWATCHED)
        seconds = sorted(seconds_of(make_run(rule, workers, rounds, 0.0), watch) for _ in range(REPEATS))
        median = statistics.median(seconds)
        spread = f"({seconds[0]:.2f} to {seconds[-1]:.2f})"
        rate = workers * rounds / median
        drifting = workers * rounds / seconds_of(make_run(rule, workers, rounds, JITTER), watch)
        print(f"{name:<8}{workers:>8,}{rounds:>8}{median:>9.2f}{spread:>18}{rate:>17,.0f}{drifting:>9,.0f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", nargs="?", help="time one run under this rule alone")
    parser.add_argument("workers", nargs="?", type=int, default=1000)
    parser.add_argument("rounds", nargs="?", type=int, default=500)
    parser.add_argument("jitter", nargs="?", type=float, default=0.0, help="sigma of a log-normal factor on steps")
    asked = parser.parse_args()
    if asked.rule:
        time_one(asked.rule, asked.workers, asked.rounds, asked.jitter)
    else:
        main()
