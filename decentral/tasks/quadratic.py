"""`Quadratic`: a bowl for each worker, whose every answer is known in closed form."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from decentral.task import Task, to_device
from decentral.tasks import streams


class Quadratic(Task):
    """f_w(x) = 1/2 (x - c_w)' diag(curvature) (x - c_w), with a centre c_w for each worker w.

    A batch is (centres, noise), each [size, dimension] float32: the worker's centre in every row, and what sample
    `i` adds to the gradient. So the loss needs no worker id, and batches of several workers may be joined.
    """

    name: ClassVar[str] = "quadratic"

    dimension: PositiveInt = 16
    """Length of `x`."""
    curvature: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.1, 1.0)
    """Either one number for each dimension, or (first, last) with a geometric row between them."""
    spread: NonNegativeFloat = 1.0
    """Standard deviation of the centres around zero; 0 gives every worker the same problem."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of each coordinate of a sample's gradient; a batch of B has noise / sqrt(B)."""
    start: float = 1.0
    """Every coordinate of `x` before the first step."""
    seed: NonNegativeInt = 0
    """Chooses the centres and the noise."""
    sample_seed: NonNegativeInt = 0
    """Chooses the noise alone."""
    eval_workers: PositiveInt = 8
    """`evaluate` takes the mean loss over the workers `0 .. eval_workers - 1`."""

    @model_validator(mode="after")
    def _curvature_fits(self) -> Quadratic:
        if len(self.curvature) not in (2, self.dimension):
            raise ValueError(
                f"curvature has {len(self.curvature)} numbers; give one for each of the {self.dimension} dimensions, "
                f"or two, (first, last)"
            )
        if self.dimension == 1 and len(self.curvature) == 2:
            raise ValueError("curvature has 2 numbers for 1 dimension; write curvature=(1.0,)")
        return self

    def model(self) -> nn.Module:
        """Return a module with one parameter `x`, [dimension] float32; its call gives each sample's loss, [size]."""
        return _Bowl(torch.full((self.dimension,), self.start), self.curvatures())

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return (centres, noise), each [size, dimension] float32."""
        return self.centre(worker).repeat(size, 1), self._noise(worker, start, size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean over the samples of f_w(x) + noise . x."""
        losses: Tensor = model(*batch)
        return losses.mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `loss`, the noiseless mean over `eval_workers` workers."""
        centres = self._centres(self.eval_workers)
        batch = to_device((centres, torch.zeros_like(centres)), next(model.parameters()).device)
        return {"loss": self.loss(model, batch).item()}

    def curvatures(self) -> Tensor:
        """Return the diagonal of the Hessian: [dimension] float32."""
        return torch.from_numpy(_curvatures(self.curvature, self.dimension)).float()

    def centre(self, worker: int) -> Tensor:
        """Return c_w: [dimension] float32."""
        return torch.from_numpy(self.spread * _directions(self.seed, worker, self.dimension)).float()

    def optimum(self, workers: int) -> Tensor:
        """Return the minimiser of the mean loss over workers `0 .. workers - 1`: [dimension] float32."""
        # The workers share their curvature, so it cancels and the mean of the centres is left.
        return self._centres(workers).double().mean(dim=0).float()

    def after_sgd(self, worker: int, lr: float, steps: int, x0: Tensor | None = None) -> Tensor:
        """Return x after `steps` of plain noiseless SGD: c + (1 - lr curvature)^steps (x0 - c), [dimension] float32.

        `x0` is [dimension]; None stands for the point where the model begins.
        """
        centre, curvature = self.centre(worker).double(), self.curvatures().double()
        begin = torch.full_like(centre, self.start) if x0 is None else x0.double()
        return (centre + (1 - lr * curvature) ** steps * (begin - centre)).float()

    def _centres(self, workers: int) -> Tensor:
        """Return [workers, dimension] float32."""
        return torch.stack([self.centre(worker) for worker in range(workers)])

    def _noise(self, worker: int, start: int, size: int) -> Tensor:
        """Return [size, dimension] float32."""
        if self.noise == 0:
            return torch.zeros(size, self.dimension)
        purpose = streams.seeded(f"quadratic noise {self.seed}", self.sample_seed)
        draws = streams.normals(purpose, worker, start * self.dimension, size * self.dimension)
        return torch.from_numpy(self.noise * draws).float().view(size, self.dimension)


@lru_cache(maxsize=16384)
def _directions(seed: int, worker: int, dimension: int) -> NDArray[np.float64]:
    return streams.normals(f"quadratic centre {seed}", worker, 0, dimension)


@lru_cache(maxsize=64)
def _curvatures(curvature: tuple[float, ...], dimension: int) -> NDArray[np.float64]:
    if len(curvature) == dimension:
        return np.array(curvature)
    return np.geomspace(curvature[0], curvature[1], dimension)


class _Bowl(nn.Module):
    """(centres, noise), each [size, dimension] -> losses [size]."""

    curvature: Tensor

    def __init__(self, start: Tensor, curvature: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)
        self.register_buffer("curvature", curvature, persistent=False)

    def forward(self, centres: Tensor, noise: Tensor) -> Tensor:
        offset = self.x - centres
        return (0.5 * self.curvature * offset.square() + noise * self.x).sum(dim=1)
