"""What a worker is at rest: enough for another one, or itself another day, to go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PARAMS = "params"
STATISTICS = "statistics"
INNER = "inner "
SLOT = "slot "
BUFFER = "buffer "


@dataclass(frozen=True)
class Life:
    """What a worker has come to besides its tensors, its own alone: with it the worker goes on as if nothing had been.

    `time_s` since the run began; `samples` trained on; `records` made for the journal since the worker came, or came
    back, a count that begins again with whoever goes on from here; `inner_steps` that the inner optimiser has done; the
    local step `next_evaluation` is due at, and whether the worker has `evaluated` before; `own_slots`, by name, which
    are not handed to a newcomer; and the accounts of its meter.
    """

    time_s: float
    samples: int
    records: int
    inner_steps: int
    next_evaluation: int
    evaluated: bool
    own_slots: tuple[str, ...]
    seconds: Mapping[str, float]
    sent_bytes: int
    received_bytes: int
    messages_sent: int


@dataclass(frozen=True)
class Snapshot:
    """A worker between two rounds: local steps done, rounds begun by channel, and copies of its tensors by name.

    These are "params" `[P]`, "statistics" `[S]` if the model has any, "inner NAME" `[P]` for the running means that the
    inner optimiser keeps, and "slot NAME" for what the rule does, all of them float32. A `whole` one is for the same
    worker another day: it has a `life`, the slots that are the worker's own too, and in place of the statistics
    "buffer NAME" for each buffer of the model's state dict, of any dtype; its tensors are in host memory.
    """

    step: int
    rounds: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    life: Life | None = None

    def for_another(self) -> Snapshot:
        """Return what another worker takes over of a whole snapshot: all but what is this worker's own."""
        own = () if self.life is None else tuple(SLOT + name for name in self.life.own_slots)
        return Snapshot(
            self.step, self.rounds, {name: values for name, values in self.tensors.items() if name not in own}
        )
