"""Cost of a worker-round in timing-only simulation, from a hundred workers to ten thousand.

Run from the repository's root (about four minutes; the picture is for whoever names a file):

    python -m benchmarks.scale [picture.png]

NoLoCo with 16 parameters and H = 50, in step and drifting apart (jitter 0.1). What a worker-round costs is the
difference between a run of few rounds and one of many. In function calls, which is the work there is to do and always
the same; and in CPU microseconds, which also say what larger fleets lose by fitting into no cache, and what other work
on the machine takes from it.
"""

from __future__ import annotations

import argparse
import cProfile
import time
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.timing_only import JITTER, make_run
from decentral.sim.simulate import simulate

WORKERS = (100, 300, 1_000, 3_000, 10_000)
WORKER_ROUNDS = 50_000
"""Of the longer run, beyond those of the shorter."""
FEW = 2
"""Rounds of the shorter run."""


class Cost(NamedTuple):
    """Function calls and CPU seconds: of a run, or of one of its worker-rounds."""

    calls: float
    cpu_s: float


def cost_of_run(workers: int, rounds: int, jitter: float) -> Cost:
    """Return what a simulation costs. It runs twice: counting calls takes time."""
    run = make_run("noloco", workers, rounds, jitter)
    began = time.process_time()
    simulate(run, timing_only=True)
    cpu_s = time.process_time() - began
    profile = cProfile.Profile()
    profile.runcall(simulate, run, timing_only=True)
    return Cost(sum(entry.callcount for entry in profile.getstats()), cpu_s)


def cost(workers: int, jitter: float) -> Cost:
    """Return what a worker-round costs in a fleet of so many."""
    more = max(2, WORKER_ROUNDS // workers)
    few, many = (cost_of_run(workers, rounds, jitter) for rounds in (FEW, FEW + more))
    return Cost(*((after - before) / (workers * more) for before, after in zip(few, many, strict=True)))


def draw(costs: dict[float, list[Cost]], path: str) -> None:
    """Draw the cost of a worker-round over the number of workers."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for jitter, of_jitter in costs.items():
        axes.plot(WORKERS, [1e6 * each.cpu_s for each in of_jitter], "o-", label=f"jitter {jitter:g}")
    axes.set(xscale="log", xlabel="workers", ylabel="CPU us a worker-round")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table; draw the picture if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", help="PNG file to draw into")
    picture = parser.parse_args().picture
    print(f"{'workers':>8}{'calls':>8}{'CPU us':>9}{'jitter: calls':>16}{'CPU us':>9}   (a worker-round)")
    simulate(make_run("noloco", 10, FEW, 0.0), timing_only=True)  # imports and caches
    costs: dict[float, list[Cost]] = {0.0: [], JITTER: []}
    for workers in WORKERS:
        for jitter, of_jitter in costs.items():
            of_jitter.append(cost(workers, jitter))
        quiet, drifting = (of_jitter[-1] for of_jitter in costs.values())
        print(
            f"{workers:>8,}{quiet.calls:>8.0f}{1e6 * quiet.cpu_s:>9.0f}"
            f"{drifting.calls:>16.0f}{1e6 * drifting.cpu_s:>9.0f}",
            flush=True,
        )
    if picture:
        draw(costs, picture)


if __name__ == "__main__":
    main()
