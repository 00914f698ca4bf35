"""EXO Gym's DiLoCo for `benchmarks.side_by_side`; runs in EXO Gym's environment.

Arguments: replicas, the folder for notes. One command starts all nodes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from exogym.strategy.diloco import DiLoCoStrategy
from exogym.strategy.optim import OptimSpec
from exogym.trainer import Trainer
from exogym_rules import Rows
from side import PERIOD, STEPS, held_out_loss, note_end, note_step
from work import BATCH, HELD_OUT, LR, data_of, model_of


class Noting(torch.nn.Module):
    """The model, which notes when it is trained; the node's rank is torch.distributed's."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model, self.folder = model_of("gpt"), folder

    def forward(self, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            name = f"steps-{torch.distributed.get_rank()}-{os.getpid()}"
            notes = os.open(self.folder / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            note_step(notes)
            os.close(notes)
        loss: torch.Tensor = self.model(batch)
        return loss


def main() -> None:
    replicas, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.chdir(folder)  # it leaves files where it stands
    held_out = data_of("gpt", HELD_OUT, seed=9)
    data = data_of("gpt", STEPS * BATCH["gpt"] * replicas, seed=3)
    model = Trainer(Noting(folder), Rows(data), Rows(held_out)).fit(
        num_epochs=1,
        max_steps=STEPS,
        strategy=DiLoCoStrategy(optim_spec=OptimSpec(torch.optim.AdamW, lr=LR["gpt"]), H=PERIOD),
        num_nodes=replicas,
        device="cpu",
        batch_size=BATCH["gpt"],
        minibatch_size=BATCH["gpt"],
        val_size=HELD_OUT,
        val_interval=STEPS,
        disable_logging=True,
    )
    note_end(folder, 0, held_out_loss(model.model))


if __name__ == "__main__":
    main()
