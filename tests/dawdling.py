"""A task that takes its time until it is told to hurry."""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from decentral.tasks import Quadratic


class Dawdling(Quadratic):
    """A quadratic whose batches take `step_s` seconds each until somebody has made the file `hurry`."""

    name: ClassVar[str] = ""

    hurry: Path
    step_s: float = 0.02

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        if not self.hurry.exists():
            time.sleep(self.step_s)
        return super().batch(worker, start, size)
