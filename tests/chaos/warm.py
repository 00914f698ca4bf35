"""Imported by the process that lives are forked from: torch imports a thousand modules when it makes an optimiser."""

from __future__ import annotations

import torch

from decentral.inner import SGD
from decentral.replica import TorchReplica
from tests.chaos import lives, tasks, witness

__all__ = ["lives", "witness"]

torch.set_num_threads(1)
TorchReplica(tasks.Paced(), SGD(lr=0.1), worker=0, seed=0, batch_size=1, total_steps=1)
