"""A model and data of one's own: a small network that learns to add numbers.

decentral train --task examples.own_model.digits:make_task --set steps=200 --set rule.period=20
"""

import torch
from torch import Tensor, nn

from decentral import Task


class Addition(Task):
    """Learns a + b from pairs of numbers. Fields are set in the run file or with --set task.width=64."""

    width: int = 32

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, self.width), nn.ReLU(), nn.Linear(self.width, 1))

    def batch(self, worker: int, start: int, size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * worker + start)  # the same samples whenever asked
        pairs = torch.rand(size, 2, generator=generator)
        return {"pairs": pairs, "sums": pairs.sum(1, keepdim=True)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch["pairs"]), batch["sums"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, self.batch(worker=10**6, start=0, size=512)))}


def make_task(width: int = 32) -> Task:
    """What --task names: a function that returns a task, called with the fields of [task]."""
    return Addition(width=width)
