"""The losses of a training loop's steps, until somebody asks for their mean."""

from __future__ import annotations

from torch import Tensor

from decentral.errors import ConfigError


class Losses:
    """A mean in the making. It stays on the losses' device: to add one waits for no GPU."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, loss: Tensor | float) -> None:
        """Add the mean loss of a step's batch. Raises `ConfigError` for a tensor of several numbers."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ConfigError(f"loss: a tensor of shape {list(loss.shape)}; give one number, such as its mean")
            loss = loss.detach().float()
        self._sum = self._sum + loss  # a new tensor: the loop may overwrite its own
        self._count += 1

    def take(self) -> float | None:
        """Return the mean of those added since the last time; None: there were none."""
        total, count = self._sum, self._count
        self._sum, self._count = 0.0, 0
        return float(total) / count if count else None
