"""The noisy quadratic on plain float64 tensors, for references that share no code with the package's training."""

from __future__ import annotations

import torch
from cluster import quadratic
from torch import Tensor

from decentral.config import Run

NOISY = {"name": "quadratic", "dimension": 12, "curvature": (0.2, 2.0), "noise": 0.3}


class Plain:
    """A run's quadratic: where it begins, and each worker's gradient at each of its local steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.task = run, quadratic(run)
        self.workers = range(run.fleet.size)
        self._curvature = self.task.curvatures().double()

    def start(self) -> Tensor:
        return torch.full((self.task.dimension,), self.task.start, dtype=torch.float64)

    def gradient(self, worker: int, step: int, x: Tensor) -> Tensor:
        size = self.run.batch_size
        noise = self.task.batch(worker, step * size, size)[1].double().mean(dim=0)
        return self._curvature * (x - self.task.centre(worker).double()) + noise

    def sgd(self, worker: int, steps: range, x: Tensor, lr: float) -> Tensor:
        """Return x after plain SGD over these local steps."""
        for step in steps:
            x = x - lr * self.gradient(worker, step, x)
        return x


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.double(), expected, rtol=0, atol=3e-6)
