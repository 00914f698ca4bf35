"""What a worker is at rest: enough for another one, or itself another day, to go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PARAMS = "params"
STATISTICS = "statistics"
INNER = "inner "
SLOT = "slot "


@dataclass(frozen=True)
class Snapshot:
    """A worker between two rounds: local steps done, rounds begun by channel, and copies of its tensors by name.

    These are "params" `[P]`, "statistics" `[S]` if the model has any, "inner NAME" `[P]` for the running means that the
    inner optimiser keeps, and "slot NAME" for what the rule does, all of them float32.
    """

    step: int
    rounds: Mapping[str, int]
    tensors: Mapping[str, Tensor]
