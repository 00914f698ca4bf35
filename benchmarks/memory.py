"""Memory of a worker beyond its model and inner optimiser, in models: what DiLoCo holds, and what a round takes.

Real workers on Ray measure themselves: resident memory after the first local step, and the peak over the rounds that
follow. Allowed are anchor and momentum (2 models), and twice what is in flight (2 models, as the whole model is synced
at once).

    python -m benchmarks.memory [--parameters 50000000] [--workers 2]
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from decentral.config import Run, validated
from decentral.journal import Evaluated
from decentral.peer import Peer
from decentral.protocols import DiLoCo
from decentral.protocols.schedule import Every, Schedule
from decentral.task import Task
from decentral.workers.launch import train

LAYERS = 16
ROUNDS = 4


class Wide(Task):
    """A stack of square layers of `parameters` elements in all, trained on one sample: next to no activations."""

    parameters: int = 50_000_000

    def model(self) -> nn.Module:
        width = round((self.parameters / LAYERS) ** 0.5)
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        return torch.ones(1, self.width)

    @property
    def width(self) -> int:
        return round((self.parameters / LAYERS) ** 0.5)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}


class MeasuredDiLoCo(DiLoCo):
    """DiLoCo that journals its worker's memory."""

    period: Schedule = Every(period=1)

    async def run(self, peer: Peer) -> None:
        await peer.train(1)
        gc.collect()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        await super().run(peer)
        metrics = {"before": before, "peak": _status("VmHWM"), "model": 4 * peer.layout.size}
        peer.record(Evaluated(time_s=peer.now(), worker=peer.id, step=peer.step, metrics=metrics))


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def run_of(parameters: int, workers: int, **rule: Any) -> Run:
    return validated(
        {
            "steps": 1 + ROUNDS,
            "batch_size": 1,
            "evaluate_every": 0,
            "task": {"name": "benchmarks.memory:Wide", "parameters": parameters},
            "rule": {"name": "benchmarks.memory:MeasuredDiLoCo", **rule},
            "inner": {"name": "adamw", "lr": 1e-4},
            "fleet": {"workers": [{"count": workers}]},
        },
        "benchmark",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    table = Table("codec", "all-reduce", "peak beyond model and AdamW, in models", "allowed")
    for codec, all_reduce in (("float32", "butterfly"), ("int8", "butterfly"), ("bf16", "gather")):
        outcome = train(run_of(options.parameters, options.workers, codec=codec, all_reduce=all_reduce))
        held = [
            (record.metrics["peak"] - record.metrics["before"]) / record.metrics["model"]
            for record in outcome.records
            if isinstance(record, Evaluated) and "peak" in record.metrics
        ]
        table.add_row(codec, all_reduce, f"{min(held):.2f} - {max(held):.2f}", "4 (anchor, momentum, twice in flight)")
    Console().print(table)


if __name__ == "__main__":
    main()
