"""Tasks for runs in which much goes wrong: real time passes in their steps, and the cores stay free."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from decentral.task import Task
from decentral.tasks import Quadratic, streams


class Paced(Quadratic):
    """A quadratic each of whose batches takes `step_s` seconds."""

    name: ClassVar[str] = ""

    step_s: NonNegativeFloat = 0.0

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.step_s)
        return super().batch(worker, start, size)


class PacedRegression(Task):
    """Linear regression under noise, whose held-out loss is known in closed form and never reaches zero.

    y = x . (1, ..., 1) + e with e ~ N(0, 1) and independent x_i ~ N(0, i^-decay). From weights of zero the loss over
    all data, 1/2 (1 + sum_i i^-decay (w_i - 1)^2), falls like a power of the steps, as losses do, towards 1/2.
    """

    dimension: PositiveInt = 64
    decay: NonNegativeFloat = 1.2
    epoch: PositiveInt = 4096
    """Samples that there are; a stream goes through them again and again, in their order."""
    step_s: NonNegativeFloat = 0.0
    """Seconds that a batch takes."""

    @property
    def samples_per_epoch(self) -> int:
        return self.epoch

    def model(self) -> nn.Module:
        """Return a linear map without bias, [size, dimension] -> [size, 1], of weights zero."""
        model = nn.Linear(self.dimension, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return x [size, dimension] and y [size, 1], float32."""
        time.sleep(self.step_s)
        samples = [_sample(self.dimension, worker, index % self.epoch) for index in range(start, start + size)]
        draws = torch.stack(samples)
        x = draws[:, :-1] * self._scales()
        return x, x.sum(dim=1, keepdim=True) + draws[:, -1:]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return half the mean squared error."""
        x, y = batch
        return (model(x) - y).square().mean() / 2

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `loss`, over all the data that could be."""
        (weights,) = model.parameters()
        distances = (weights.flatten() - 1) * self._scales()
        return {"loss": 0.5 * (1 + distances.square().sum().item())}

    def _scales(self) -> Tensor:
        """Return the standard deviation of each coordinate of x: [dimension] float32."""
        return torch.arange(1, self.dimension + 1).pow(-self.decay / 2)


@lru_cache(maxsize=8192)
def _sample(dimension: int, worker: int, index: int) -> Tensor:
    """Return dimension + 1 standard normal numbers, float32."""
    width = dimension + 1
    return torch.from_numpy(streams.normals("paced regression", worker, index * width, width)).float()
