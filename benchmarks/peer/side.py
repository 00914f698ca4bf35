"""What every system trains in `benchmarks.side_by_side`, in plain PyTorch: one GPT, its samples, notes of its steps."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from work import BATCH, HELD_OUT, LR, data_of, model_of

STEPS = 120
PERIOD = 10
OUTER = {"lr": 0.7, "momentum": 0.9}
"""The outer optimiser of whoever has one; with Nesterov's momentum where it is on offer."""


class Replica:
    """Rank `rank` of `replicas`: the model, AdamW, its samples, and notes in `folder` of when each step began."""

    def __init__(self, rank: int, replicas: int, folder: Path) -> None:
        torch.set_num_threads(1)
        self.rank, self.replicas, self.folder = rank, replicas, folder
        self.model: nn.Module = model_of("gpt")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR["gpt"])
        self.step = 0
        (self._samples,) = data_of("gpt", STEPS * BATCH["gpt"] * replicas, seed=3)
        self._notes = os.open(folder / f"steps-{rank}-{os.getpid()}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def batch(self) -> Tensor:
        size = BATCH["gpt"]
        return self._samples[torch.arange(self.step * size, (self.step + 1) * size) * self.replicas + self.rank]

    def train(self) -> None:
        """Do one local step."""
        note_step(self._notes)
        self.optimizer.zero_grad()
        self.model(self.batch()).backward()
        self.optimizer.step()
        self.step += 1

    def finish(self) -> None:
        """Note the held-out loss of the model as it is."""
        note_end(self.folder, self.rank, held_out_loss(self.model))


def note_step(notes: int) -> None:
    os.write(notes, f"{time.monotonic()}\n".encode())


def note_end(folder: Path, rank: int, loss: float) -> None:
    (folder / f"end-{rank}").write_text(json.dumps(loss))


def held_out_loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(model(*data_of("gpt", HELD_OUT, seed=9)))
