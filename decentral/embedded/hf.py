"""`DecentralCallback` for Hugging Face's `Trainer`. Needs the extra `decentral[hf]`.

with decentral.join("run.toml") as fleet:
    Trainer(model, args, train_dataset=texts, callbacks=[DecentralCallback(fleet)]).train()
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decentral.embedded.join import Fleet
from decentral.embedded.sync import Sync


class DecentralCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches a Trainer's model and optimizer to the fleet when training begins, and counts its optimizer steps.

    A round comes where an optimizer step is done, however many backward passes it took, and before the Trainer logs,
    evaluates or saves at that step. Training stops when the run is over; the last round is done before the last
    evaluation. Processes that the Trainer has joined share one replica. Raises as `Fleet.attach` does.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sync: Sync | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_others: Any,
    ) -> None:
        self._sync = self._fleet.attach(model, optimizer, group=dist.group.WORLD if args.world_size > 1 else None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> TrainerControl:
        assert self._sync is not None
        if not self._sync.step():
            control.should_training_stop = True
        self._close_if_stopping(control)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        # Whoever stops it may have done so after our turn; and the best model, if it is loaded, is so after this.
        self._close_if_stopping(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        assert self._sync is not None
        self._sync.close()

    def _close_if_stopping(self, control: TrainerControl) -> None:
        assert self._sync is not None
        if control.should_training_stop:
            self._sync.close()
