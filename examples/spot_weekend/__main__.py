"""Which rule reaches a loss first and cheapest on spot machines? `python -m examples.spot_weekend [--seeds N]`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console

from examples.spot_weekend.pictures import line_of, plot_costs, plot_curves, results_table
from examples.spot_weekend.runs import measure, runs

TARGET = 2.42
"""Held-out loss in nats: what DDP without churn (seed 0) comes to after 84 steps, 70 % of 120 (run with churn off)."""


def main() -> None:
    """Run all, print a line for each run, and draw the pictures."""
    parser = argparse.ArgumentParser(prog="python -m examples.spot_weekend", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each under the seeds 0 to N - 1 (1)")
    parser.add_argument("--target", type=float, default=TARGET, metavar="LOSS", help=f"nats to be reached ({TARGET})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the pictures go (beside this)")
    arguments = parser.parse_args()
    jobs = [job for seed in range(arguments.seeds) for job in runs(seed)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        waiting = [pool.submit(measure, *job, arguments.target) for job in jobs]
        results = []
        for each in waiting:
            results.append(each.result())
            print(line_of(results[-1]), flush=True)
    Console(width=140).print(results_table(results, arguments.target))
    plot_curves(results, arguments.target, arguments.out / "loss.png")
    plot_costs(results, arguments.out / "costs.png")


if __name__ == "__main__":
    main()
