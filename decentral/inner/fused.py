"""SGD and AdamW, by torch's fused kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from decentral.inner.base import Coefficient, Inner
from decentral.inner.flat import Flat


class SGD(Inner):
    """Stochastic gradient descent: v <- momentum v + g + weight_decay x; x <- x - lr v."""

    name: ClassVar[str] = "sgd"

    momentum: Coefficient = 0.0
    """Share of the velocity that is kept from step to step."""
    nesterov: bool = False
    """Look ahead: step along g + momentum v."""
    weight_decay: NonNegativeFloat = 0.0
    """Added to the gradient as weight_decay x (L2)."""

    @property
    def momenta(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum above 0, for example momentum=0.9")
        return self

    def build(self, params: Tensor) -> Flat:
        """Return the optimiser over the flat parameters, [P] and floating point."""
        return Flat(params, self.lr, self.momenta, self._update)

    def _update(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        sgd(
            [params],
            [grad],
            [state.get("momentum_buffer")],
            fused=True,
            lr=lr,
            momentum=self.momentum,
            dampening=0.0,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            maximize=False,
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

    @property
    def momenta(self) -> tuple[str, ...]:
        return ("exp_avg",)

    @property
    def variances(self) -> tuple[str, ...]:
        return ("exp_avg_sq",)

    def build(self, params: Tensor) -> Flat:
        """Return the optimiser over the flat parameters, [P] and floating point."""
        optimizer = Flat(params, self.lr, (*self.momenta, *self.variances), self._update)
        optimizer.state[params]["step"] = torch.zeros((), dtype=torch.float32, device=params.device)
        return optimizer

    def _update(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        adamw(
            [params],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=False,
            maximize=False,
        )
