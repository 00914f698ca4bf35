"""DiLoCo against federated averaging: as EXO Gym compares them, with a line of it put right, and as decentral does.

    python -m benchmarks.peers exogym
    python -m benchmarks.diloco_or_fedavg [--seeds 3]          (about five minutes on two cores)

The GPT of `benchmarks.exogym`, 859,136 parameters on 4 nodes, 60 steps of 4 rows each, a round every 10, AdamW; each
seed has weights and samples of its own. EXO Gym's DiLoCo on a CPU gives rank 0 its outer model's own storage, so that
from the second round on the outer gradient, outer model minus rank 0's, is zero and the outer optimiser does nothing:
what remains is averaging. `patched` is EXO Gym with a copy there. On a GPU that line copies already, and nothing here
says what other models would show. EXO Gym's first round comes after 11 steps and ours after 10, so its nodes do 61.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.peer import work
from benchmarks.peers import python_of
from decentral.config import validated
from decentral.sim.simulate import simulate
from decentral.task import Task


class Work(Task):
    """The same work as a task: worker w takes every `NODES`-th sample."""

    name: ClassVar[str] = ""

    seed: int

    def model(self) -> nn.Module:
        return work.model_of("gpt", self.seed)

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, ...]:
        (rows,) = work.data_of("gpt", work.samples("gpt"), seed=3 + 10 * self.seed)
        return (rows[torch.arange(start, start + size) * work.NODES + worker],)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = model(batch[0])
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, work.data_of("gpt", work.HELD_OUT, seed=9)))}


def ours(seed: int, rule: str) -> float:
    run = validated(
        {
            "steps": work.STEPS["gpt"],
            "batch_size": work.BATCH["gpt"],
            "evaluate_every": 0,
            "task": {"name": "benchmarks.diloco_or_fedavg:Work", "seed": seed},
            "rule": {"name": rule, "period": work.PERIOD},
            "inner": {"name": "adamw", "lr": work.LR["gpt"], "betas": (0.9, 0.999), "weight_decay": 0.01},
            "fleet": {"workers": [{"count": work.NODES}]},
        },
        "diloco_or_fedavg",
    )
    return simulate(run).after["loss"]


def theirs(seed: int, rule: str) -> float:
    script = Path(__file__).resolve().parent / "peer" / "exogym_diloco.py"
    command = [str(python_of("exogym")), str(script), str(seed), rule]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    if python_of("exogym") is None:
        raise SystemExit("EXO Gym is not there; `python -m benchmarks.peers exogym` makes its environment")
    averaged = {"EXO Gym": [theirs(seed, "fedavg") for seed in seeds]}
    diloco = {"EXO Gym": [theirs(seed, "diloco") for seed in seeds]}
    averaged["EXO Gym, patched"], diloco["EXO Gym, patched"] = (
        averaged["EXO Gym"],
        [theirs(seed, "patched") for seed in seeds],
    )
    averaged["decentral"], diloco["decentral"] = (
        [ours(seed, "local_sgd") for seed in seeds],
        [ours(seed, "diloco") for seed in seeds],
    )
    table = Table(
        "", "FedAvg", "DiLoCo", "DiLoCo - FedAvg, by seed", title=f"held-out loss, mean of {len(seeds)} seeds"
    )
    for who, losses in diloco.items():
        gaps = [mine - other for mine, other in zip(losses, averaged[who], strict=True)]
        means = f"{statistics.mean(averaged[who]):.3f}", f"{statistics.mean(losses):.3f}"
        table.add_row(who, *means, " ".join(f"{gap:+.3f}" for gap in gaps))
    Console().print(table)


if __name__ == "__main__":
    main()
