"""A task for runs in which much goes wrong: real time passes in its steps, and the cores stay free."""

from __future__ import annotations

import time
from typing import ClassVar

from pydantic import NonNegativeFloat
from torch import Tensor

from decentral.tasks import Quadratic


class Paced(Quadratic):
    """A quadratic each of whose batches takes `step_s` seconds."""

    name: ClassVar[str] = ""

    step_s: NonNegativeFloat = 0.0

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.step_s)
        return super().batch(worker, start, size)
