"""In which order a stage goes forward and back through the microbatches of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One pass through a stage."""

    kind: Literal["forward", "backward"]
    microbatch: int


def gpipe(stage: int, stages: int, microbatches: int) -> list[Action]:
    """Forward through all, then back through all (Huang et al., 2019); keeps the activations of every microbatch.

    Back in the same order, in which "1f1b" goes too, so that gradients add up to the same bits.
    """
    forward = [Action("forward", index) for index in range(microbatches)]
    return forward + [Action("backward", index) for index in range(microbatches)]


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> list[Action]:
    """Forward until the first gradient can be there, then by turns (PipeDream-Flush, Narayanan et al., 2021).

    Keeps the activations of `stages - stage` microbatches at most.
    """
    ahead = min(stages - stage - 1, microbatches)
    actions = [Action("forward", index) for index in range(ahead)]
    for index in range(microbatches - ahead):
        actions += [Action("forward", ahead + index), Action("backward", index)]
    return actions + [Action("backward", index) for index in range(microbatches - ahead, microbatches)]


ORDERS: dict[str, Callable[[int, int, int], list[Action]]] = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
"""The orders by the name that run files use: (stage, stages, microbatches) -> what the stage does, in turn."""
