"""The inner optimiser: how one worker steps its flat parameters between two talks with others.

Optimisers run over ONE flat tensor [P] that holds all parameters of a replica, so a step is one fused operation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PrivateAttr, model_validator
from torch import Tensor

from decentral.errors import ConfigError
from decentral.part import Part

Fraction = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, lt=1)]


Matrix = tuple[int, int, int]
"""Where a matrix lies in the flat parameters, row by row: (start, rows, columns)."""


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

    @property
    def momenta(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum above 0, for example momentum=0.9")
        return self

    def build(self, params: Tensor) -> torch.optim.SGD:
        """Return a fused `torch.optim.SGD` over the flat parameters, [P] and floating point."""
        optimizer = torch.optim.SGD(
            [params],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )
        _begin(optimizer, params, self.momenta)
        return optimizer


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

    def build(self, params: Tensor) -> torch.optim.AdamW:
        """Return a fused `torch.optim.AdamW` over the flat parameters, [P] and floating point."""
        optimizer = torch.optim.AdamW(
            [params], lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
        _begin(optimizer, params, ("exp_avg", "exp_avg_sq"))
        optimizer.state[params]["step"] = torch.zeros((), dtype=torch.float32, device=params.device)
        return optimizer


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

    def build(self, params: Tensor) -> torch.optim.Optimizer:
        """Return the optimiser over the flat parameters, [P] and floating point."""
        return _Flat(params, self)

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


class _Flat(torch.optim.Optimizer):
    """Steps one flat tensor as a `MultiMomentum` says."""

    def __init__(self, params: Tensor, inner: MultiMomentum) -> None:
        super().__init__([params], {"lr": inner.lr})
        self._inner = inner
        _begin(self, params, (*inner.momenta, *inner.variances))
        self.state[params]["step"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        inner, (group,) = self._inner, self.param_groups
        (params,) = group["params"]
        state, limit = self.state[params], inner.clip_value
        grad = params.grad.clone() if limit is None else params.grad.clamp(-limit, limit)
        params.mul_(1 - group["lr"] * inner.weight_decay)
        inner.update(params, grad, state, group["lr"])
        state["step"] += 1


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

    def build(self, params: Tensor) -> torch.optim.Optimizer:
        """Return the optimiser over the flat parameters, [P] and floating point; AdamW alone if it was not `fit`."""
        return _Muon(params, self, self._matrices)


class _Muon(torch.optim.Optimizer):
    def __init__(self, params: Tensor, inner: Muon, matrices: tuple[Matrix, ...]) -> None:
        super().__init__([params], {"lr": inner.lr})
        self._inner, self._matrices = inner, matrices
        cuts = [0, *(end for start, rows, columns in matrices for end in (start, start + rows * columns))]
        ends = [*cuts[1:], params.numel()]
        self._rest = [(start, end) for start, end in zip(cuts[::2], ends[::2], strict=True) if start < end]
        _begin(self, params, (*inner.momenta, *inner.variances))
        self.state[params]["step"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        inner, (group,) = self._inner, self.param_groups
        (params,) = group["params"]
        state, grad, lr, (beta1, beta2) = self.state[params], params.grad, group["lr"], inner.betas
        state["step"] += 1
        params.mul_(1 - lr * inner.weight_decay)
        for start, rows, columns in self._matrices:
            part = slice(start, start + rows * columns)
            average = state["exp_avg"][part].lerp_(grad[part], 1 - inner.momentum)
            ahead = grad[part].lerp(average, inner.momentum).view(rows, columns)
            params[part].view(rows, columns).sub_(orthogonalised(ahead), alpha=lr * 0.2 * max(rows, columns) ** 0.5)
        for start, stop in self._rest:
            average = state["exp_avg"][start:stop].lerp_(grad[start:stop], 1 - beta1)
            square = state["exp_avg_sq"][start:stop]
            square.mul_(beta2).addcmul_(grad[start:stop], grad[start:stop], value=1 - beta2)
            spread = (square / (1 - beta2 ** state["step"])).sqrt_().add_(inner.eps)
            params[start:stop].addcdiv_(average, spread, value=-lr / (1 - beta1 ** state["step"]))


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


def _begin(optimizer: torch.optim.Optimizer, params: Tensor, names: tuple[str, ...]) -> None:
    """Make the optimiser's state now, as zeros: who reads it before the first step finds what that step will find."""
    for name in names:
        optimizer.state[params][name] = torch.zeros_like(params)


INNER: dict[str, type[Inner]] = {"sgd": SGD, "adamw": AdamW, "qhadam": QHAdam, "adopt": ADOPT, "muon": Muon}
"""The inner optimisers by the name that run files use."""


def _progress(step: float, start: float, end: float) -> float:
    """Return how far `step` is from `start` (0) to `end` (1), and never outside."""
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)
