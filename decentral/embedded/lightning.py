"""`DecentralCallback` for Lightning's `Trainer`. Needs the extra `decentral[lightning]`.

with decentral.join("run.toml") as fleet:
    Trainer(max_steps=1000, callbacks=[DecentralCallback(fleet)]).fit(module, loader)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from decentral.embedded.join import Fleet
from decentral.embedded.sync import Sync
from decentral.errors import TaskError


class DecentralCallback(Callback):  # type: ignore[misc]
    """Attaches a Trainer's module and its one optimizer to the fleet, and counts its optimizer steps.

    A round comes at the end of the batch with which an optimizer step is done, however many batches it took, and before
    the Trainer validates or saves there. Training stops when the run is over. Processes that the Trainer has joined
    share one replica. The journal has the losses of modules that leave the optimizer's steps to the Trainer. Raises
    `TaskError` for several optimizers, and as `Fleet.attach` does.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sync: Sync | None = None
        self._counted = 0
        self._losses: list[Tensor] = []  # since the last optimizer step, each already divided by their number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise TaskError(f"the module has {len(trainer.optimizers)} optimizers; a worker of a run has one")
        self._counted = trainer.global_step
        group = dist.group.WORLD if trainer.world_size > 1 else None
        self._sync = self._fleet.attach(pl_module, trainer.optimizers[0], group=group)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._sync is not None
        if pl_module.automatic_optimization and isinstance(outputs, Mapping) and outputs.get("loss") is not None:
            self._losses.append(outputs["loss"])
        while self._counted < trainer.global_step:  # a module that steps by itself may do several in a batch
            self._counted += 1
            loss = torch.stack(self._losses).sum() if self._losses else None
            self._losses.clear()
            if not self._sync.step(loss):
                trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._sync is not None
        self._sync.close()
