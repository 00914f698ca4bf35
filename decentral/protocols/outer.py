"""What is made of a mean outer gradient: outer optimisers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.naming import Kind


class Outer(Kind):
    """An outer optimiser: one step on the anchor from a mean outer gradient (anchor minus parameters)."""

    called = "outer optimiser"
    built_in: ClassVar[dict[str, type[Outer]]] = {}

    lr: float = Field(gt=0)
    """Outer learning rate (eta)."""

    def fit(self, sizes: Sequence[int]) -> Outer:
        """Return the optimiser for vectors that are tensors of so many elements each, one after the other."""
        return self

    def delayed(self, staleness: float) -> Outer:
        """Return the optimiser for an outer gradient that is so many updates old, as the server has measured it."""
        return self

    @abstractmethod
    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        """Change `anchor` and `momentum` in place; `gradient` is left alone. All `[n]` float32."""

    def stretched(self, ratio: float) -> Outer:
        """Return the optimiser for rounds `ratio` times as long: mu' = mu^ratio, eta' = eta (1 - mu') / (1 - mu).

        It remembers as many local steps, and a constant outer gradient moves it as far a round in the end. Raises
        `ConfigError` for an optimiser without a field `momentum`.
        """
        momentum = getattr(self, "momentum", None)
        if not isinstance(momentum, float):
            raise ConfigError(
                f"rule.outer: '{self.spelling()}' has no momentum that could follow the length of a phase; "
                "choose 'nesterov' or 'sgd'"
            )
        kept = momentum**ratio
        return self.model_copy(update={"momentum": kept, "lr": self.lr * (1 - kept) / (1 - momentum)})


class OuterSGD(Outer):
    """Heavy ball: b <- mu b + g; anchor <- anchor - eta b. With momentum 0 and lr 1 the anchor becomes the mean."""

    name = "sgd"
    lr: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """mu."""

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        if self.momentum == 0:
            anchor.sub_(gradient, alpha=self.lr)
            return
        momentum.mul_(self.momentum).add_(gradient)
        anchor.sub_(momentum, alpha=self.lr)


class Nesterov(Outer):
    """b <- mu b + g; anchor <- anchor - eta (g + mu b), as torch's SGD(nesterov=True).

    Defaults from DiLoCo, arXiv 2311.08105, table 5. A constant g moves the anchor by eta (1 + mu) g at first and by
    eta g / (1 - mu) in the end.
    """

    name = "nesterov"
    lr: float = Field(default=0.7, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """mu."""

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        momentum.mul_(self.momentum).add_(gradient)
        anchor.sub_(gradient, alpha=self.lr).sub_(momentum, alpha=self.lr * self.momentum)


Outer.built_in.update({outer.name: outer for outer in (OuterSGD, Nesterov)})
OUTERS = Outer.built_in


def consensus_momentum(
    slow: Tensor,
    velocity: Tensor,
    mean_fast: Tensor,
    mean_slow: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
) -> None:
    """NoLoCo's outer step in place: velocity <- alpha velocity + beta mean(fast - slow) - gamma (slow - mean(slow)).

    Then slow <- slow + velocity. `mean_fast` and `mean_slow` are the group's means of the fast weights (theta) and of
    the slow ones (phi), all `[n]`. With gamma = beta the slow mean cancels, so `mean_slow` may then be `slow` itself.
    arXiv 2506.10911, equations 2 and 3, with the sign of beta as in the appendix and the code (the body prints minus).
    """
    velocity.mul_(alpha).add_(mean_fast - mean_slow, alpha=beta)
    if mean_slow is not slow:
        velocity.sub_(slow - mean_slow, alpha=gamma)
    slow.add_(velocity)
