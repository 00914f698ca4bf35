"""`Clusters`: ten classes, each made of two normal clouds, with labels that may be skewed between workers."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from decentral.task import Task
from decentral.tasks import streams

CLASSES, CLOUDS, DIMENSION = 10, 2, 20
EVALUATOR = 1_000_000
"""The worker whose stream of pictures nobody trains on; its labels are never skewed."""


class Clusters(Task):
    """Tells ten classes apart, two clouds of unit variance in 20 dimensions each, with a network of one hidden layer.

    A batch is (points [size, 20] float32, labels [size] int64).
    """

    headline: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    dirichlet_alpha: PositiveFloat | None = None
    """Skew of the labels: worker w draws its classes with weights ~ Dirichlet(alpha); None draws from all alike."""
    seed: NonNegativeInt = 0
    """Chooses the clouds, the samples and each worker's classes."""

    def model(self) -> nn.Module:
        """Return a new model: [B, 20] float32 -> [B, 10] logits."""
        return nn.Sequential(nn.Linear(DIMENSION, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return (points, labels)."""
        draws = streams.uniforms(f"label {self.seed}", worker, start, size)
        if self.dirichlet_alpha is None or worker == EVALUATOR:
            labels = (draws * CLASSES).astype(np.int64)
        else:
            shares = np.cumsum(_weights(self.seed, worker, self.dirichlet_alpha))
            labels = np.searchsorted(shares, draws, side="right").clip(max=CLASSES - 1)
        clouds = streams.integers(f"cloud {self.seed}", worker, start, size, below=CLOUDS)
        noise = streams.normals(f"noise {self.seed}", worker, start * DIMENSION, size * DIMENSION)
        points = _centres(self.seed)[labels, clouds] + noise.reshape(size, DIMENSION)
        return torch.from_numpy(points).float(), torch.from_numpy(labels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy, in nats."""
        points, labels = batch
        return F.cross_entropy(model(points), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` (nats) and `accuracy` (0 to 1) on 2000 held-out points of all classes alike."""
        points, labels = self.batch(EVALUATOR, 0, 2000)
        logits = model(points)
        right = (logits.argmax(dim=1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": right}


@lru_cache(maxsize=8)
def _centres(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return [classes, clouds, dimension]: standard normal."""
    draws = streams.normals(f"centres {seed}", 0, 0, CLASSES * CLOUDS * DIMENSION)
    return draws.reshape(CLASSES, CLOUDS, DIMENSION)


@lru_cache(maxsize=256)
def _weights(seed: int, worker: int, alpha: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    generator = np.random.default_rng(streams.hashes(f"class weights {seed}", worker, 0, 1))
    return generator.dirichlet(np.full(CLASSES, alpha))
