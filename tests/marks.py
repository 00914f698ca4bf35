"""A task that shows in the model which samples it was trained on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from decentral.task import Task

SAMPLES = 4096
"""More than any run here has."""


class Marks(Task):
    """Coordinate i of the model is 0 until sample i has been trained on, and above 0 as long as that is not lost."""

    name: ClassVar[str] = "marks"
    asked: ClassVar[list[tuple[int, int, int]]] = []
    """Every call of `batch`, in this process."""
    epoch: int | None = None

    @property
    def samples_per_epoch(self) -> int | None:
        return self.epoch

    def model(self) -> nn.Module:
        model = nn.Module()
        model.x = nn.Parameter(torch.zeros(SAMPLES))
        return model

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        self.asked.append((worker, start, size))
        return torch.arange(start, start + size)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        x = model.x
        assert isinstance(x, Tensor)
        return -x[batch].sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}
