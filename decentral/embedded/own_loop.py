"""What stands in the run file of a joined run as its task: what is trained is known to the user's own loop alone."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from decentral.errors import TaskError
from decentral.task import Task


class OwnLoop(Task):
    """The model and the data of a training loop of the user's own. Whatever is asked of it raises `TaskError`."""

    def model(self) -> nn.Module:
        _only_there()

    def batch(self, worker: int, start: int, size: int) -> Any:
        _only_there()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        _only_there()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        _only_there()


def _only_there() -> NoReturn:
    raise TaskError("this run was that of training loops which had joined it: start them again, not this run file")
