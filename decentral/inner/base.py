"""What all inner optimisers share: the learning rate over a run, and gradient clipping."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from decentral.errors import ConfigError
from decentral.inner.flat import Optimizer
from decentral.naming import Kind

Fraction = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, lt=1)]


Matrix = tuple[int, int, int]
"""Where a matrix lies in the flat parameters, row by row: (start, rows, columns)."""


class Inner(Kind):
    """A learning rate schedule, gradient clipping, and the update that a subclass builds.

    Weight decay applies to every parameter, vectors and matrices alike, as in DiLoCo's torch code: in a flat buffer
    they lie side by side. Fields are in the units of torch.optim.
    """

    called = "inner optimiser"
    built_in: ClassVar[dict[str, type[Inner]]] = {}

    lr: PositiveFloat
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly; step 0 already has lr / warmup_steps."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up: stay, fall along a half cosine, or stay and fall linearly at the end."""
    final_lr_fraction: Fraction = 0.1
    """Share of `lr` at which `cosine` and `wsd` end."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps, at the end, over which `wsd` falls."""
    clip_norm: PositiveFloat | None = None
    """Largest Euclidean norm of the whole gradient; a longer one is scaled down to it."""

    @property
    def momenta(self) -> tuple[str, ...]:
        """Names under which the optimiser's state holds running means of the gradient, each `[P]`."""
        return ()

    @property
    def variances(self) -> tuple[str, ...]:
        """Names under which it holds running means of the squared gradient, each `[P]` and nowhere negative."""
        return ()

    def fit(self, matrices: Sequence[Matrix]) -> Inner:
        """Return the optimiser for flat parameters that hold these matrices; most do not look at shapes."""
        return self

    @abstractmethod
    def build(self, params: Tensor) -> Optimizer:
        """Return an optimiser over the flat parameters, [P] and floating point."""

    def lr_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step, counted from 0; from `total_steps` on it stays at its last value.

        Raises `ConfigError` if the warm-up and the decay do not fit into `total_steps`.
        """
        self.check(total_steps)
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * _progress(step, self.warmup_steps, total_steps)))
        elif self.schedule == "wsd":
            remaining = 1 - _progress(step, self._decay_start(total_steps), total_steps)
        else:
            remaining = 1.0
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining)

    def check(self, total_steps: int) -> None:
        """Raise `ConfigError` if the warm-up and the decay do not fit into a run of `total_steps`."""
        end = self._decay_start(total_steps) if self.schedule == "wsd" else total_steps
        if self.warmup_steps > end:
            decay = f" before its decay begins at step {end:g}" if self.schedule == "wsd" else ""
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} does not fit into a run of {total_steps} steps{decay}; "
                f"at most {math.floor(end)} do"
            )

    def step(self, optimizer: Optimizer, step: int, total_steps: int, norm: float | None = None) -> None:
        """Clip the gradient that lies in the flat tensor's `.grad`, set the step's learning rate, and update.

        `norm` is that of the whole gradient, if this is a part of it.
        """
        group = optimizer.param_groups[0]
        if self.clip_norm is not None and norm is None:
            torch.nn.utils.clip_grad_norm_(group["params"], self.clip_norm)
        elif self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(group["params"], self.clip_norm, torch.tensor(norm))
        group["lr"] = self.lr_at(step, total_steps)
        optimizer.step()

    def stacked(self, params: Tensor, matrices: Sequence[Matrix]) -> Optimizer:
        """Return an optimiser over the parameters of several replicas `[k, P]`, each of which holds these matrices.

        It steps them as if each had its own.
        """
        size = params.shape[1]
        starts = range(0, params.numel(), size)
        each = [(first + start, rows, columns) for first in starts for start, rows, columns in matrices]
        return self.fit(each).build(params.view(-1))

    def step_stacked(self, optimizer: Optimizer, grads: Tensor, step: int, total_steps: int) -> None:
        """Do what `step` does for each replica of `stacked`, of which these are the gradients `[k, P]`."""
        (params,) = optimizer.param_groups[0]["params"]
        params.grad = grads.view(-1)
        if self.clip_norm is not None:
            norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
            grads.mul_((self.clip_norm / (norms + 1e-6)).clamp_(max=1.0))  # as torch.nn.utils.clip_grad_norm_ does
        optimizer.param_groups[0]["lr"] = self.lr_at(step, total_steps)
        optimizer.step()

    def _decay_start(self, total_steps: int) -> float:
        return total_steps * (1 - self.decay_fraction)


def _progress(step: float, start: float, end: float) -> float:
    """Return how far `step` is from `start` (0) to `end` (1), and never outside."""
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)
