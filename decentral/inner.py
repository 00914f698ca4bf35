"""The inner optimiser: how one worker steps its flat parameters between two talks with others.

Optimisers run over ONE flat tensor [P] that holds all parameters of a replica, so a step is one fused operation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor

from decentral.errors import ConfigError
from decentral.part import Part

Fraction = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, lt=1)]


class Inner(Part):
    """A learning rate schedule, gradient clipping, and the update that a subclass builds.

    Weight decay applies to every parameter, vectors and matrices alike, as in DiLoCo's torch code: in a flat buffer
    they lie side by side. Fields are in the units of torch.optim.
    """

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

    @abstractmethod
    def build(self, params: Tensor) -> torch.optim.Optimizer:
        """Return a fused optimiser over the flat parameters, [P] and floating point."""

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

    def step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
        """Clip the gradient that lies in the flat tensor's `.grad`, set the step's learning rate, and update."""
        group = optimizer.param_groups[0]
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], self.clip_norm)
        group["lr"] = self.lr_at(step, total_steps)
        optimizer.step()

    def _decay_start(self, total_steps: int) -> float:
        return total_steps * (1 - self.decay_fraction)


class SGD(Inner):
    """Stochastic gradient descent: v <- momentum v + g + weight_decay x; x <- x - lr v."""

    name: ClassVar[str] = "sgd"

    momentum: Coefficient = 0.0
    """Share of the velocity that is kept from step to step."""
    nesterov: bool = False
    """Look ahead: step along g + momentum v."""
    weight_decay: NonNegativeFloat = 0.0
    """Added to the gradient as weight_decay x (L2)."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum above 0, for example momentum=0.9")
        return self

    def build(self, params: Tensor) -> torch.optim.SGD:
        """Return a fused `torch.optim.SGD` over the flat parameters, [P] and floating point."""
        return torch.optim.SGD(
            [params],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class AdamW(Inner):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    x <- (1 - lr weight_decay) x - lr m / (sqrt(v) + eps), with bias-corrected m and v.
    """

    name: ClassVar[str] = "adamw"

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.99)
    """Decay of the running mean and of the running square of the gradient; 0.999 forgets too slowly for short runs."""
    eps: PositiveFloat = 1e-8
    """Keeps a coordinate whose gradient is nearly zero from taking a full step."""
    weight_decay: NonNegativeFloat = 0.1
    """Share of x, times lr, taken off at each step."""

    def build(self, params: Tensor) -> torch.optim.AdamW:
        """Return a fused `torch.optim.AdamW` over the flat parameters, [P] and floating point."""
        return torch.optim.AdamW(
            [params], lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


INNER: dict[str, type[Inner]] = {"sgd": SGD, "adamw": AdamW}
"""The inner optimisers by the name that run files use."""


def _progress(step: float, start: float, end: float) -> float:
    """Return how far `step` is from `start` (0) to `end` (1), and never outside."""
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)
