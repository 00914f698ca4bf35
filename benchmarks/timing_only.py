"""Speed of timing-only simulation: worker-rounds a second, records included.

Run from the repository's root (about two minutes; other work on the machine shows in the spread):

    python -m benchmarks.timing_only

Prints the median of 3 runs with minimum and maximum. A worker-round is one local phase of one worker and the round of
talk after it. Gossip costs a worker-round the same however many workers there are, a butterfly all-reduce sends two
packets to every other member. The last column is a fleet whose workers drift apart (jitter 0.1): then nothing happens
at the same instant, and all-reduce flows end one by one, each changing the rates of all others.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from decentral.config import Run, validated
from decentral.sim.simulate import simulate

REPEATS = 3
PERIOD = 50
JITTER = 0.1
CASES = (  # rule, workers, rounds
    ("noloco", 100, 200),
    ("noloco", 1_000, 100),
    ("noloco", 10_000, 4),
    ("ddp", 32, 20),
    ("ddp", 128, 2),
    ("diloco", 32, 20),
    ("diloco", 128, 2),
)


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


def seconds_of(run: Run) -> float:
    """Return the wall-clock seconds of a simulation."""
    start = time.perf_counter()
    simulate(run, timing_only=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    heads = f"{'rule':<8}{'workers':>8}{'rounds':>8}{'seconds':>9}{'(min to max)':>18}"
    print(f"{heads}{'worker-rounds/s':>17}{'jitter':>9}")
    for rule, workers, rounds in CASES:
        seconds = sorted(seconds_of(make_run(rule, workers, rounds, 0.0)) for _ in range(REPEATS))
        median = statistics.median(seconds)
        spread = f"({seconds[0]:.2f} to {seconds[-1]:.2f})"
        rate = workers * rounds / median
        drifting = workers * rounds / seconds_of(make_run(rule, workers, rounds, JITTER))
        print(f"{rule:<8}{workers:>8,}{rounds:>8}{median:>9.2f}{spread:>18}{rate:>17,.0f}{drifting:>9,.0f}", flush=True)


if __name__ == "__main__":
    main()
