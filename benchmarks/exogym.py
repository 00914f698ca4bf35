"""A comparison of five rules, as EXO Gym runs it and as decentral simulates it: the same models, samples and settings.

    python -m benchmarks.peers exogym
    python -m benchmarks.exogym [--turns 3]

DDP, federated averaging, DiLoCo, SPARTA and DeMo on 4 nodes: an MLP of 26k parameters for 300 steps, and a GPT of 859k
for 60. Each side is one command, timed from start to end, with one thread per process: EXO Gym trains one rule after
the other, each in four processes; decentral compares as many rules at a time as there are cores. It says besides what
EXO Gym has no notion of: bytes per worker, and virtual seconds on a fleet of 100 Mbit/s.

Not comparable: EXO Gym's DiLoCo on a CPU shares storage between the outer model and rank 0, so that its outer gradient
is zero from the second round on; its DDP reduces parameter by parameter. EXO Gym needs one word patched to run on Linux
(`lo0` is `lo` here), which `benchmarks.peers` does.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.peer import work
from benchmarks.peers import python_of
from decentral.compare.comparison import read_comparison
from decentral.compare.plan import Plan
from decentral.compare.work import work_through
from decentral.config import Run, validated
from decentral.task import Task

RULES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fedavg": {"name": "local_sgd", "period": work.PERIOD},
    "diloco": {"name": "diloco", "period": work.PERIOD},
    "sparta": {"name": "sparta", "rate": work.SHARE},
    "demo": {"name": "demo"},
}


class Work(Task):
    """EXO Gym's work as a task: worker w takes every `NODES`-th sample."""

    name: ClassVar[str] = ""

    kind: str = "mlp"

    def model(self) -> nn.Module:
        return work.model_of(self.kind)

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, ...]:
        rows = torch.arange(start, start + size) * work.NODES + worker
        return tuple(column[rows] for column in _samples(self.kind))

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = model(batch if len(batch) > 1 else batch[0])
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, work.data_of(self.kind, work.HELD_OUT, seed=9)))}


@functools.lru_cache(maxsize=1)
def _samples(kind: str) -> tuple[Tensor, ...]:
    return work.data_of(kind, work.samples(kind), seed=3)


def run_of(kind: str, rule: str) -> Run:
    """Return the work under a rule, with EXO Gym's inner optimiser for it."""
    sgd = {"name": "sgd", "lr": work.LR[kind]}
    return validated(
        {
            "steps": work.STEPS[kind],
            "batch_size": work.BATCH[kind],
            "evaluate_every": work.STEPS[kind],
            "task": {"name": "benchmarks.exogym:Work", "kind": kind},
            "rule": RULES[rule],
            "inner": sgd if rule == "demo" else {"name": "adamw", "lr": work.LR[kind]},
            "fleet": {"workers": [{"count": work.NODES}]},
        },
        "exogym",
    )


def ours(kind: str) -> dict[str, list[float]]:
    """Return what each rule comes to in a comparison: loss, megabytes sent per worker, virtual seconds."""
    plan = Plan({kind: [(rule, run_of(kind, rule)) for rule in RULES]}, seeds=None, equal="samples", budget=None)
    with tempfile.TemporaryDirectory() as folder:
        work_through(plan, Path(folder))
        rows = read_comparison(plan, Path(folder), targets={}).rows
    return {
        row["rule"]: [row["after"][0]["loss"], row["bytes_sent_per_worker"] / 1e6, row["virtual_seconds"]]
        for row in rows
    }


def timed(command: list[str], folder: Path) -> tuple[float, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ours", choices=list(work.STEPS), help="do our side alone and print it as JSON")
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options.ours)))
        return
    peer = python_of("exogym")
    if peer is None:
        raise SystemExit("EXO Gym is not there; `python -m benchmarks.peers exogym` makes its environment")
    here = Path(__file__).resolve().parent
    for kind in work.STEPS:
        seconds: list[list[float]] = [[], []]
        for _ in range(options.turns):  # by turns, so that both meet the same machine
            took, theirs = timed([str(peer), str(here / "peer" / "exogym_rules.py"), kind], here.parent)
            seconds[0].append(took)
            took, mine = timed([sys.executable, "-m", "benchmarks.exogym", "--ours", kind], here.parent)
            seconds[1].append(took)
        ratios = [mine_s / theirs_s for theirs_s, mine_s in zip(*seconds, strict=True)]
        table = Table("rule", "EXO Gym's loss", "our loss", "MB sent a worker", "virtual s", title=f"{kind}: 4 nodes")
        for rule, (loss, megabytes, virtual) in mine.items():
            table.add_row(rule, f"{theirs[rule]:.3f}", f"{loss:.3f}", f"{megabytes:.2f}", f"{virtual:.1f}")
        Console().print(table)
        print(
            f"{kind}: five rules in {statistics.median(seconds[1]):.1f} s, EXO Gym in "
            f"{statistics.median(seconds[0]):.1f} s: {statistics.median(ratios):.2f} of its time "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {options.turns} turns); the loss of guessing is "
            f"{work.chance(kind):.3f}"
        )


if __name__ == "__main__":
    main()
