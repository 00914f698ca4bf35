"""The user's optimiser: its learning rate, and its running means by name, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from decentral.inner import Inner


class Observed(Inner):
    """What rules may know of an optimiser that is not ours, as of now: its learning rate and which means it keeps."""

    name = "the optimizer of your loop"
    lr: float = Field(ge=0)
    """That of the first parameter group; a schedule may have it at 0."""
    first: tuple[str, ...] = ()
    """Names of the running means of the gradient."""
    second: tuple[str, ...] = ()
    """Names of the running means of the squared gradient."""

    @property
    def momenta(self) -> tuple[str, ...]:
        return self.first

    @property
    def variances(self) -> tuple[str, ...]:
        return self.second

    def build(self, params: Tensor) -> NoReturn:
        raise NotImplementedError("the optimiser is made by who wrote the loop")


class Means:
    """The running means that a torch optimiser keeps for each parameter: those of Adam, AdamW and SGD are known.

    Of other optimisers none is: rules that need them refuse, and a newcomer's optimiser begins anew.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        while isinstance(inside := getattr(optimizer, "optimizer", None), Optimizer):  # one that wraps another
            optimizer = inside
        self._optimizer = optimizer
        self._group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        first, second = _kept(optimizer)
        self._observed = Observed(lr=0.0, first=first, second=second)

    def observed(self) -> Observed:
        """Return what the optimiser is as of now."""
        return self._observed.model_copy(update={"lr": float(self._optimizer.param_groups[0]["lr"])})

    def holds(self, parameter: Tensor) -> bool:
        """Return whether the optimiser steps that parameter."""
        return parameter in self._group_of

    def of(self, parameter: Tensor, name: str) -> Tensor:
        """Return the parameter's live running mean of that name, zeros if it has none."""
        mean = self._state(parameter).get(name)
        return torch.zeros_like(parameter) if mean is None else mean

    def begin(self, parameter: Tensor) -> None:
        """Have all running means of a parameter, zeros as before its first step, if it has none yet."""
        names = (*self._observed.first, *self._observed.second)
        if self.holds(parameter) and not self._state(parameter):
            state = {name: torch.zeros_like(parameter) for name in names}
            if isinstance(self._optimizer, Adam):
                group = self._group_of[parameter]
                beside = group.get("capturable") or group.get("fused")
                state["step"] = torch.zeros((), device=parameter.device if beside else None)
            self._optimizer.state[parameter].update(state)

    def steps(self, parameters: Sequence[Tensor]) -> int:
        """Return how many steps the optimiser believes it has done on any of these; 0 if it does not count them."""
        return max((int(self._state(parameter).get("step", 0)) for parameter in parameters), default=0)

    def set_steps(self, parameters: Sequence[Tensor], steps: int) -> None:
        """Have it believe that it has done so many, on those that it has stepped."""
        for parameter in parameters:
            if isinstance(counter := self._state(parameter).get("step"), Tensor):
                counter.fill_(steps)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._optimizer.state.get(parameter, {})
        return state


def _kept(optimizer: Optimizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    groups = optimizer.param_groups
    if isinstance(optimizer, Adam):  # AdamW is one
        most = ("max_exp_avg_sq",) if any(group["amsgrad"] for group in groups) else ()
        return ("exp_avg",), ("exp_avg_sq", *most)
    if isinstance(optimizer, SGD) and all(group["momentum"] for group in groups):
        return ("momentum_buffer",), ()
    return (), ()
