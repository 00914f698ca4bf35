"""Adaptive optimisers with running means of several memories: QHAdam and ADOPT."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from decentral.inner.base import Coefficient, Fraction, Inner
from decentral.inner.flat import Flat


class MultiMomentum(Inner):
    """An adaptive optimiser that steps along a mixture of the gradient and of running means of different memory.

    Weight decay is decoupled: x <- (1 - lr weight_decay) x. A subclass says what is averaged, and what divides
    it.
    """

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    decays: tuple[Coefficient, ...] = Field(default=(0.9,), min_length=1)
    """Decay of each running mean of the gradient (beta_j); its half-life is ln 0.5 / ln beta_j steps."""
    weights: tuple[Fraction, ...] = (1.0,)
    """Share of each running mean in the step (omega_j); what is missing to 1 is the gradient's own."""
    beta2: Coefficient = 0.9999
    """Decay of the running mean of the squared gradient."""
    eps: PositiveFloat = 1e-6
    """Keeps a coordinate whose gradient is nearly zero from taking a full step."""
    weight_decay: NonNegativeFloat = 0.0
    """Share of x, times lr, taken off at each step."""
    clip_value: PositiveFloat | None = None
    """Largest absolute value of a coordinate of the gradient (rho); a larger one is cut to it."""

    @model_validator(mode="after")
    def _weights_fit(self) -> MultiMomentum:
        if len(self.weights) != len(self.decays) or sum(self.weights) > 1 + 1e-9:
            raise ValueError(f"weights must be one for each of the {len(self.decays)} decays, together at most 1")
        return self

    @property
    def momenta(self) -> tuple[str, ...]:
        return tuple(f"exp_avg_{index}" for index in range(len(self.decays)))

    @property
    def variances(self) -> tuple[str, ...]:
        return ("exp_avg_sq",)

    def build(self, params: Tensor) -> Flat:
        """Return the optimiser over the flat parameters, [P] and floating point."""
        optimizer = Flat(params, self.lr, (*self.momenta, *self.variances), self._step)
        optimizer.state[params]["step"] = 0
        return optimizer

    def _step(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        ours = grad.clone() if self.clip_value is None else grad.clamp(-self.clip_value, self.clip_value)
        params.mul_(1 - lr * self.weight_decay)
        self.update(params, ours, state, lr)
        state["step"] += 1

    @abstractmethod
    def update(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        """Change `params` and `state` in place by one step; `grad` `[P]` is ours to change. `state["step"]`: from 0."""

    def _mixed(self, value: Tensor, state: dict[str, Any]) -> Tensor:
        """Let the running means take `value` in; return (1 - sum omega) value + sum_j omega_j mean_j."""
        mixed = value * (1 - sum(self.weights))
        for name, decay, weight in zip(self.momenta, self.decays, self.weights, strict=True):
            mixed.add_(state[name].lerp_(value, 1 - decay), alpha=weight)
        return mixed


class QHAdam(MultiMomentum):
    """Quasi-hyperbolic Adam with any number of momenta, as MT-DAO uses it; without bias correction.

        u_j <- beta_j u_j + (1 - beta_j) g;   v <- beta2 v + (1 - beta2) g^2
        x <- x - lr [(1 - sum_j omega_j) g + sum_j omega_j u_j] / (sqrt(v) + eps)

    MT-DAO, arXiv 2510.05361, from a note on the paper; one momentum of weight omega is QHAdam, Ma and Yarats, arXiv
    1810.06801. One of weight 1 is Adam without bias correction, weight 0 is RMSprop.
    """

    name: ClassVar[str] = "qhadam"

    decays: tuple[Coefficient, ...] = Field(default=(0.999,), min_length=1)
    """Decay of each running mean of the gradient (beta_j); its half-life is ln 0.5 / ln beta_j steps."""
    weights: tuple[Fraction, ...] = (0.9,)
    """Share of each running mean in the step (omega_j); what is missing to 1 is the gradient's own.

    The note on the paper gives no value; in the literature on QHAdam it is 0.7 to 0.95.
    """
    beta2: Coefficient = 0.99
    """Decay of the running mean of the squared gradient.

    Without bias correction the first steps are 1 / sqrt(1 - beta2) times as long: more than 0.99 needs a warm-up.
    """

    def update(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        square = state["exp_avg_sq"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        params.addcdiv_(self._mixed(grad, state), square.sqrt().add_(self.eps), value=-lr)


class ADOPT(MultiMomentum):
    """Adam whose second moment does not know the gradient that it divides: it converges with any beta2.

        n_t = clip(g_t / max(sqrt(v_(t-1)), eps), t^(1/4));   u <- beta u + (1 - beta) n_t;   x <- x - lr u
        v_t = beta2 v_(t-1) + (1 - beta2) g_t^2;   step t = 0 only sets v_0 = g_0^2

    Taniguchi et al., arXiv 2411.02853, algorithm 2 with its clipping. The inner optimiser of DES-LOC; several momenta,
    or weights below 1, are MT-DAO's variant of it.
    """

    name: ClassVar[str] = "adopt"

    def update(self, params: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        square, step = state["exp_avg_sq"], state["step"]
        if step == 0:
            square.copy_(grad).mul_(grad)
            return
        bound = step**0.25
        normal = (grad / square.sqrt().clamp_(min=self.eps)).clamp_(-bound, bound)
        params.add_(self._mixed(normal, state), alpha=-lr)
        square.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
