"""A user's task module, whose tasks misbehave when they are told to."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from decentral.tasks import Quadratic


class Gated(Quadratic):
    """A quadratic on which nobody gets past sample `at` before somebody has made the file `gate`."""

    name: ClassVar[str] = ""

    at: int = 0
    gate: Path | None = None

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        while self.gate is not None and start >= self.at and not self.gate.exists():
            threading.Event().wait(0.02)
        return super().batch(worker, start, size)


class Faulty(Gated):
    """A quadratic on which one worker meets a fault at sample `at`, not before there is `gate` if one is named."""

    name: ClassVar[str] = ""

    worker: int = 1
    fault: str = ""
    pids: Path | None = None

    def model(self) -> nn.Module:
        model = super().model()
        if self.fault == "unequal":
            with torch.no_grad():
                next(model.parameters()).add_(float.fromhex("0x" + os.urandom(4).hex()))
        return model

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        if self.pids is not None and start == 0:
            (self.pids / str(worker)).write_text(str(os.getpid()))
        centres, noise = super().batch(worker, start, size)
        if worker == self.worker and start <= self.at < start + size:
            if self.fault == "raises":
                raise ValueError("no such batch")
            if self.fault == "hangs":
                threading.Event().wait()
            if self.fault == "exits":
                os._exit(1)
        if worker == self.worker and self.fault == "slow":
            threading.Event().wait(0.01)
        return centres, noise
