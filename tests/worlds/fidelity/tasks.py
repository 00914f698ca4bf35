"""A task whose local steps take a stated time on any machine: real time passes, and the cores stay free."""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from decentral.task import Task


class Paced(Task):
    """A bowl around zero in many dimensions; a loss takes `step_s` seconds."""

    name: ClassVar[str] = ""

    dimension: PositiveInt = 1_000_000
    step_s: PositiveFloat = 0.1
    dies: int | None = None
    """The worker that kills itself,"""
    dies_at: int = 0
    """before it computes this sample."""

    def model(self) -> nn.Module:
        return _Bowl(self.dimension)

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        if worker == self.dies and start == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((size,), 1.0 + worker)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(self.step_s)
        loss: Tensor = model(batch)
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(model(torch.ones(1)))}


class _Bowl(nn.Module):
    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(dimension))

    def forward(self, batch: Tensor) -> Tensor:
        return batch.mean() * self.x.square().mean()
