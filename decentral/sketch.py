"""How far replicas are apart, though nobody ever has two of them: sketches of parameters, whose distances are theirs.

A sketch is `NUMBERS` sums of parameters under random signs, the same ones for everybody. Each squared difference of two
of its numbers is, in the mean over signs, the squared distance of the parameters summed there (Alon, Matias & Szegedy,
"The space complexity of approximating the frequency moments", 1996). Distances are those of the parameters within
about 1 / sqrt(2 NUMBERS) = 9 %, and exactly zero for equal ones.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 64
CHUNK = 1 << 20
"""Elements that are summed at a time, of which each chunk has signs of its own."""


def sketch_of(params: Tensor) -> str:
    """Return the sketch of `params` `[P]`: `NUMBERS` float32 in base64, P operations."""
    sums = torch.zeros(NUMBERS, dtype=torch.float64, device=params.device)
    for number, chunk in enumerate(torch.split(params, CHUNK)):
        signs = torch.randint(0, 2, chunk.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(number))
        signed = chunk * (2 * signs - 1).to(chunk.device)
        sums += F.pad(signed, (0, -len(signed) % NUMBERS)).view(-1, NUMBERS).sum(dim=0, dtype=torch.float64)
    return base64.b64encode(sums.cpu().numpy().astype("<f4").tobytes()).decode()


class Sketches:
    """The sketches of replicas at one time, of which the spread is asked; sums alone are kept."""

    def __init__(self) -> None:
        self.count = 0
        self._first = self._total = np.zeros(NUMBERS)
        self._squares = 0.0

    def add(self, sketch: str) -> None:
        """Take in a replica's."""
        numbers = np.frombuffer(base64.b64decode(sketch), "<f4").astype(np.float64)
        if not self.count:
            self._first = numbers
        self.count += 1
        other = numbers - self._first  # of equal ones nothing but zeros is summed
        self._total = self._total + other
        self._squares += float(other @ other)

    @property
    def variance(self) -> float:
        """The mean square of their distances to their mean."""
        mean = self._total / self.count
        return max(0.0, self._squares / self.count - float(mean @ mean))

    @property
    def square(self) -> float:
        """The square of their mean."""
        mean = self._first + self._total / self.count
        return float(mean @ mean)


def distance(stages: Collection[Sketches]) -> float:
    """Return sqrt(mean_i |x_i - m|^2) / |m| for replicas x_i with the mean m, from the sketches of each stage.

    Infinite if the mean is zero; not finite if a replica is not.
    """
    square = sum(stage.square for stage in stages)
    return math.sqrt(sum(stage.variance for stage in stages) / square) if square else math.inf
