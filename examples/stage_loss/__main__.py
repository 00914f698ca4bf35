"""What does it cost to lose stages, by each way to recover them? `python -m examples.stage_loss [--seeds N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from examples.stage_loss import harsher
from examples.stage_loss.kept import results
from examples.stage_loss.pictures import line_of, plot_curves, plot_hours, results_table
from examples.stage_loss.runs import NO_LOSSES, TARGET, replays, runs


def main() -> None:
    """Run all, print a line for each run, and draw the pictures."""
    parser = argparse.ArgumentParser(prog="python -m examples.stage_loss", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each under the seeds 0 to N - 1 (1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the pictures go (beside this)")
    parser.add_argument("--harsher", action="store_true", help="as many losses as in the paper: iterations alone")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/stage_loss"), help="where results are kept; those there are not rerun"
    )
    arguments = parser.parse_args()
    console, runs_of = Console(width=140), harsher.runs if arguments.harsher else runs
    found = []
    for result in results([job for seed in range(arguments.seeds) for job in runs_of(seed)], TARGET, arguments.keep):
        found += [result, *(replays(result) if result.way == NO_LOSSES and not arguments.harsher else [])]
        print(line_of(result), flush=True)
    if arguments.harsher:
        console.print(harsher.iterations_table(found))
        return
    console.print(results_table(found, TARGET))
    plot_curves(found, TARGET, arguments.out / "loss.png")
    plot_hours(found, arguments.out / "hours.png")


if __name__ == "__main__":
    main()
