"""The picture of the two claims about a straggler: `python -m examples.papers.picture FILE [--seeds N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from examples.papers.runner import curve_of, outcome_of
from examples.papers.unequal import backed_runs, coded_runs

CLAIMS = {"gradient_coding": coded_runs, "dbw": backed_runs}


def figure_of(seeds: int) -> Figure:
    """Return the held-out losses over virtual seconds, a line for each rule and seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    each = figure.subplots(1, len(CLAIMS))
    for axes, (claim, runs_of) in zip(each, CLAIMS.items(), strict=True):
        for seed in range(seeds):
            for index, (name, run) in enumerate(runs_of(seed).items()):
                seconds, _, losses = zip(*curve_of(outcome_of(run)).points, strict=True)
                axes.plot(seconds, losses, color=f"C{index}", linewidth=1.2, label=name if seed == 0 else None)
        axes.set(title=claim, xlabel="virtual seconds", ylabel="held-out loss", ylim=0)
        axes.legend()
    return figure


def main() -> None:
    """Draw into the file named."""
    parser = argparse.ArgumentParser(prog="python -m examples.papers.picture", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="picture to write, such as stragglers.png")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (3)")
    arguments = parser.parse_args()
    figure_of(arguments.seeds).savefig(arguments.file, dpi=110)


if __name__ == "__main__":
    main()
