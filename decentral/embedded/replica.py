"""The replica of a user's own training loop, as a `Peer` sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from decentral.embedded.copies import Copy
from decentral.embedded.gate import Answer, Gate, Look, Train
from decentral.embedded.means import Observed
from decentral.errors import ConfigError
from decentral.replica import Spans, always, digest, require_state, set_statistics_of, statistics_of


class AttachedReplica:
    """A `Replica` whose local steps are those of a loop at the other side of the `gate`.

    It must have been gathered once. `ends` is told the local step from which on the loop does none.
    """

    loading_s = 0.0
    """What the loop does between its steps is its own business."""

    def __init__(self, copy: Copy, gate: Gate, batch_size: int) -> None:
        assert copy.params is not None
        self.layout, self.batch_size = copy.layout, batch_size
        self.params, self.grads = copy.params, copy.params.new_empty(0)
        self.ends: Callable[[int], None] = lambda _step: None
        self._copy, self._gate = copy, gate
        self._initial: Tensor | None = copy.params.clone()  # until the first local step
        self._inner_steps: int | None = None  # what the loop has not been told yet

    def anew(self) -> AttachedReplica:
        """Return this replica with the initial weights. The loop has not been asked for anything yet."""
        assert self._initial is not None
        self.params.copy_(self._initial)
        return self

    # -- what rules use ----------------------------------------------------------------------------------------------

    @property
    def inner(self) -> Observed:
        """What the loop's optimiser is as of now."""
        return self._copy.optimiser.observed()

    def inner_state(self, name: str) -> Tensor:
        require_state(self.inner, name)
        if name not in self._copy.means:
            self._gate.ask(Look(name))
        means = self._copy.means[name]
        assert means is not None
        return means

    @property
    def inner_steps(self) -> int:
        return self._copy.inner_steps if self._inner_steps is None else self._inner_steps

    def set_inner_steps(self, steps: int) -> None:
        self._inner_steps = steps

    def vector(self, size: int) -> Tensor:
        return self.params.new_empty(size)

    def new_slot(self, like: Tensor | None) -> Tensor:
        return torch.zeros_like(self.params) if like is None else like.detach().clone()

    def train(self, step: int, steps: int, goes_on: Callable[[], bool] = always) -> Answer:
        """Have the loop do local steps `step .. step + steps - 1`; return how many of them it did, and their mean loss.

        Nothing but its own end ends them early.
        """
        self._initial = None
        told, self._inner_steps = self._inner_steps, None
        done = self._gate.ask(Train(step, steps, told))
        if done.steps < steps:
            self.ends(step + done.steps)
        return done

    def buffers(self) -> dict[str, Tensor]:
        """Return nothing: what the model keeps beside its parameters is for the loop to save."""
        return {}

    def statistics(self) -> Tensor:
        return statistics_of(self._copy.norms)

    def set_statistics(self, values: Tensor) -> None:
        set_statistics_of(self._copy.norms, values)

    def digest(self) -> int:
        return digest([self.params])

    def abandon(self) -> None:
        """Nothing is under way that must end before the state is somebody else's."""

    def expect_train(self, step: int, steps: int) -> None:
        """Nothing begins before it is asked for."""

    def expect_backward(self, step: int, fragments: Sequence[Spans], worker: int | None = None) -> None:
        """Nothing begins before it is asked for."""

    # -- what a loop does not offer ----------------------------------------------------------------------------------

    def set_learning_rate(self, lr: float) -> None:
        _refuse("another learning rate, which is the loop's own")

    def lease(self, step: int, start: int) -> None:
        _refuse("samples of its choice")

    def backward(
        self, step: int, fragments: Sequence[Spans], ready: Callable[[int], None], worker: int | None = None
    ) -> float:
        _refuse("gradients")

    def update(self, step: int, norm: float | None = None) -> None:
        _refuse("a step of the inner optimiser")

    def loss(self, step: int) -> float:
        _refuse("a loss")

    def evaluate(self) -> dict[str, float]:
        _refuse("held-out metrics")

    def estimate_statistics(self, step: int, batches: int) -> None:
        _refuse("statistics of batch normalisation, estimated anew")


def _refuse(what: str) -> NoReturn:
    raise ConfigError(
        f"rule: it asks for {what}, and a training loop of your own does local steps alone; take a rule that needs no "
        "more, such as 'diloco', 'streaming_diloco', 'local_sgd', 'noloco' or 'gossip'"
    )
