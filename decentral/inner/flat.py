"""The optimiser that an inner optimiser builds: one flat tensor, its state, and how a step changes both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, dict[str, Any], float], None]
"""Changes parameters `[P]` and state in place by one step: (parameters, gradient `[P]`, state, learning rate)."""


class Optimizer(Protocol):
    """What is used of an optimiser. A `torch.optim.Optimizer` over one flat tensor is one, too."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]: ...
    def step(self) -> Any: ...


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the live state of an optimiser's one tensor."""
    (params,) = optimizer.param_groups[0]["params"]
    return optimizer.state[params]


def steps_of(optimizer: Optimizer) -> int:
    """Return how many steps an optimiser believes it has done; 0 if it does not count them."""
    return int(state_of(optimizer).get("step", 0))


def set_steps_of(optimizer: Optimizer, steps: int) -> None:
    """Have an optimiser believe that it has done so many steps, as its bias corrections go by them."""
    state = state_of(optimizer)
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(steps)
    elif "step" in state:
        state["step"] = steps


class Flat:
    """Steps one flat tensor, `[P]` and floating point; with the attributes that a `torch.optim.Optimizer` has.

    It is none itself: the first of those in a process imports torch's compiler, a second of work for nothing. `names`
    are those of the state's running means, each `[P]`. They are zeros from the beginning: who reads them before the
    first step finds what that step will find.
    """

    def __init__(self, params: Tensor, lr: float, names: tuple[str, ...], update: Update) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [params], "lr": lr}]
        self.state: dict[Tensor, dict[str, Any]] = {params: {name: torch.zeros_like(params) for name in names}}
        self._update = update

    @torch.no_grad()
    def step(self) -> None:
        """Take one step along the gradient in the parameters' `.grad`."""
        (group,) = self.param_groups
        (params,) = group["params"]
        self._update(params, params.grad, self.state[params], group["lr"])
