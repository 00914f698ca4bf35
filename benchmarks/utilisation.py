"""The bandwidth that two sites need to keep computing: Streaming DiLoCo's table 4, by simulation.

    python -m benchmarks.utilisation

Prints, for data-parallel training, DiLoCo, Streaming DiLoCo, the same with one step of overlap, and that with 4-bit
outer gradients, the Gbit/s of the link at which workers compute 50, 80, 90, 95 and 99 % of the time, beside the paper's
(Douillard et al., arXiv 2501.18512), for models of 1B, 10B and 100B parameters. Every value of the paper lies on a grid
of 50 bandwidths, 0.1 to 1000 Gbit/s, each 1.207 times the one before; so do ours. About two minutes.

Each bandwidth is tried by a timing-only simulation of `benchmarks/utilisation.toml`: nothing here knows a formula for
when a layer waits. The paper does not say how many bits travel for a parameter. bf16 and E3M0 have 16 and 4; the table
is met best, cell by cell, by 13.4 and 3.35 bits. That share is *fitted*; it is the nominal one if the paper prints the
notch below the one that suffices. All cells agree for 12.6 to 15.6 bits. Two more tables are printed: with the nominal
payload, and for workers that wait for all layers and send all at once, as the real ones of this package do.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

from decentral.config import Run, read_run
from decentral.journal import Trained
from decentral.sim.simulate import simulate

RUN_FILE = Path(__file__).with_suffix(".toml")
UTILISATIONS = (0.50, 0.80, 0.90, 0.95, 0.99)
GRID = tuple(10 ** (-1 + 4 * notch / 49) for notch in range(50))
"""Gbit/s."""
SCALE = 1e-3
"""Parameters and link are simulated so much smaller: without latency their ratio alone counts, and messages are few."""
NOTCH = GRID[1] / GRID[0]


class Setting(NamedTuple):
    """What the paper leaves open, and what it takes for granted."""

    payload: float
    """Share of the codec's bits that travels."""
    layerwise: bool = True
    """Whether a layer's forward pass waits for that layer alone, and a layer is sent as soon as it is final."""


FITTED, NOMINAL, OURS = Setting(13.4 / 16), Setting(1.0), Setting(13.4 / 16, layerwise=False)


class Model(NamedTuple):
    """A model of the table."""

    name: str
    parameters: float
    layers: int
    step_s: float


MODELS = (Model("1B", 1e9, 24, 0.1), Model("10B", 10e9, 48, 0.8), Model("100B", 100e9, 108, 4.9))

OVERLAP = ("rule.overlap=1",)
RULES = {
    "data-parallel": (
        "rule.name=ddp",
        "rule.buckets.name=layers",
        "rule.buckets.layers=1",
        "rule.codec=bf16",
        "steps=3",
    ),
    "DiLoCo": ("rule.fragments=whole", "rule.overlap=0", "rule.alpha=0.0"),
    "streaming": ("rule.overlap=0",),
    "+ overlap": OVERLAP,
    "+ E3M0": (*OVERLAP, "rule.codec=e3m0"),
}
"""What each row of the table changes in the run file. One fragment without overlap and alpha 0 is DiLoCo, bit for bit.

Data-parallel training waits for all layers before a step, which here is no longer than for the first layer: its
gradient is the last to be ready.
"""

PAPER = {
    "data-parallel": (
        (86.8, 152.6, 184.2, 222.3, 569.0),
        (104.8, 222.3, 222.3, 268.3, 471.5),
        (184.2, 323.8, 390.7, 390.7, 471.5),
    ),
    "DiLoCo": (
        (1.4, 6.2, 13.3, 23.3, 86.8),
        (1.7, 7.5, 16.0, 33.9, 104.8),
        (3.0, 11.0, 23.3, 49.4, 184.2),
    ),
    "streaming": (
        (1.4, 5.2, 9.1, 16.0, 28.1),
        (1.7, 5.2, 9.1, 13.3, 19.3),
        (2.4, 6.2, 9.1, 11.0, 19.3),
    ),
    "+ overlap": (
        (1.4, 4.3, 6.2, 9.1, 11.0),
        (1.7, 3.6, 5.2, 6.2, 7.5),
        (1.7, 3.6, 4.3, 5.2, 5.2),
    ),
    "+ E3M0": (
        (0.4, 0.9, 1.7, 2.0, 3.0),
        (0.4, 0.9, 1.4, 1.4, 1.7),
        (0.5, 0.9, 1.1, 1.1, 1.4),
    ),
}
"""Gbit/s by rule, model and utilisation."""


def make_run(rule: str, model: Model, gbps: float, setting: Setting = FITTED) -> Run:
    """Return the run of a cell at a bandwidth, each way."""
    cell = {
        "task.layers": model.layers,
        "task.parameters": SCALE * model.parameters * setting.payload,
        "fleet.step_time_s": model.step_s,
        "fleet.up_bps": SCALE * gbps * 1e9,
        "fleet.down_bps": SCALE * gbps * 1e9,
        "fleet.layerwise": str(setting.layerwise).lower(),
        "patience_s": 1e9,
    }
    return read_run(RUN_FILE, [*RULES[rule], *(f"{key}={value}" for key, value in cell.items())])


@functools.cache
def utilisation(rule: str, model: Model, gbps: float, setting: Setting = FITTED) -> float:
    """Return the share of its time that a worker computes in the last third of a run, which is one whole period."""
    run = make_run(rule, model, gbps, setting)
    trained = [record for record in simulate(run, timing_only=True).records if isinstance(record, Trained)]
    ended = {record.step: record.time_s for record in trained if record.worker == 0}
    steps = run.steps // 3
    return steps * model.step_s / (ended[3 * steps] - ended[2 * steps])


def needed_gbps(rule: str, model: Model, share: float, setting: Setting = FITTED) -> float:
    """Return the least bandwidth of the grid at which workers compute that share of the time."""
    low, high = 0, len(GRID) - 1
    while low < high:
        middle = (low + high) // 2
        if utilisation(rule, model, GRID[middle], setting) >= share:
            high = middle
        else:
            low = middle + 1
    return GRID[low]


def notch_of(gbps: float) -> int:
    """Return the place in the grid of the value nearest to a printed one, which has one decimal."""
    return min(range(len(GRID)), key=lambda notch: abs(math.log(GRID[notch] / gbps)))


def print_table(title: str, setting: Setting) -> None:
    """Print every cell, a star at those that are more than a notch off, and how many are not."""
    print(f"\n{title}: {16 * setting.payload:.1f} bits a parameter, {4 * setting.payload:.2f} in E3M0")
    same = near = cells = 0
    for rule, rows in PAPER.items():
        for model, row in zip(MODELS, rows, strict=True):
            told = []
            for share, published in zip(UTILISATIONS, row, strict=True):
                ours = needed_gbps(rule, model, share, setting)
                notches = abs(notch_of(ours) - notch_of(published))
                same, near, cells = same + (notches == 0), near + (notches <= 1), cells + 1
                told.append(f"{ours:6.1f} /{published:6.1f} ={ours / published:5.2f}{' ' if notches <= 1 else '*'}")
            print(f"{rule:<14}{model.name:>5} " + " ".join(told).rstrip(), flush=True)
    print(f"{same} of {cells} cells equal, {near} within one notch (x{NOTCH:.3f})")


def main() -> None:
    """Print the tables."""
    print(
        f"Gbit/s for computing {', '.join(f'{share:.0%}' for share in UTILISATIONS)} of the time: ours / paper = ratio"
    )
    print_table("Payload fitted", FITTED)
    print_table("Payload nominal", NOMINAL)
    print_table("As real workers of this package train, each phase in one block; payload fitted", OURS)


if __name__ == "__main__":
    main()
