"""Muon: a layer's matrices step along their orthogonalised momentum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PrivateAttr
from torch import Tensor

from decentral.inner.base import Coefficient, Inner, Matrix
from decentral.inner.flat import Flat


class Muon(Inner):
    """Steps a layer's matrices along their orthogonalised momentum, and everything else as AdamW does.

        u <- mu u + (1 - mu) g;   x <- (1 - lr weight_decay) x - lr 0.2 sqrt(max(m, n)) O((1 - mu) g + mu u)

    O brings the singular values of an m x n matrix near 1, by five Newton-Schulz iterations. Jordan et al., "Muon",
    2024; the factor, which makes a step about as long as AdamW's so that they share learning rate and weight decay, is
    from arXiv 2502.16982. Embeddings, head, biases and norms stay with AdamW. With DiLoCo it is MuLoCo (arXiv
    2505.23725): period 30, outer Nesterov 0.7 with momentum 0.6.
    """

    name: ClassVar[str] = "muon"

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    momentum: Coefficient = 0.95
    """Decay of the running mean of a matrix's gradient (mu)."""
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.99)
    """Elsewhere: decay of the running mean and of the running square of the gradient."""
    eps: PositiveFloat = 1e-8
    """Elsewhere: keeps a coordinate whose gradient is nearly zero from taking a full step."""
    weight_decay: NonNegativeFloat = 0.1
    """Share of x, times lr, taken off at each step."""
    _matrices: tuple[Matrix, ...] = PrivateAttr(())

    @property
    def momenta(self) -> tuple[str, ...]:
        return ("exp_avg",)

    @property
    def variances(self) -> tuple[str, ...]:
        """Zero on matrices, which have none."""
        return ("exp_avg_sq",)

    def fit(self, matrices: Sequence[Matrix]) -> Muon:
        fitted = self.model_copy()
        fitted._matrices = tuple(sorted(matrices))
        return fitted

    def build(self, params: Tensor) -> Flat:
        """Return the optimiser over the flat parameters, [P] and floating point; AdamW alone if it was not `fit`."""
        optimizer = Flat(params, self.lr, (*self.momenta, *self.variances), self._update)
        optimizer.state[params]["step"] = 0
        return optimizer

    def _update(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        beta1, beta2 = self.betas
        state["step"] += 1
        params.mul_(1 - lr * self.weight_decay)
        for start, rows, columns in self._matrices:
            part = slice(start, start + rows * columns)
            average = state["exp_avg"][part].lerp_(grad[part], 1 - self.momentum)
            ahead = grad[part].lerp(average, self.momentum).view(rows, columns)
            params[part].view(rows, columns).sub_(orthogonalised(ahead), alpha=lr * 0.2 * max(rows, columns) ** 0.5)
        for start, stop in self._elsewhere(params.numel()):
            average = state["exp_avg"][start:stop].lerp_(grad[start:stop], 1 - beta1)
            square = state["exp_avg_sq"][start:stop]
            square.mul_(beta2).addcmul_(grad[start:stop], grad[start:stop], value=1 - beta2)
            spread = (square / (1 - beta2 ** state["step"])).sqrt_().add_(self.eps)
            params[start:stop].addcdiv_(average, spread, value=-lr / (1 - beta1 ** state["step"]))

    def _elsewhere(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of what lies between the matrices, in so many parameters."""
        at = 0
        for start, rows, columns in (*self._matrices, (size, 0, 0)):
            if at < start:
                yield at, start
            at = start + rows * columns


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix `[m, n]` with the same singular vectors and singular values in about 0.7 .. 1.2; zero stays zero.

        X <- X / |X|;   five times  A = X X',  X <- a X + (b A + c A A) X,   (a, b, c) = (3.4445, -4.7750, 2.0315)

    Singular values below 1e-3 of the norm or so come out smaller.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide: Tensor = (matrix.T if tall else matrix) / (torch.linalg.vector_norm(matrix) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if tall else wide
