"""A run's curves for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decentral.errors import ConfigError
from decentral.journal import Record
from decentral.watching.curves import Curves


class WandbWriter:
    """Logs a run's curves to the project, each worker's over its own local steps; `table` is kept as the run's config.

    W&B's own environment variables hold: WANDB_MODE=offline writes below `folder` alone, for `wandb sync`. Raises
    `ConfigError` where the extra `decentral[wandb]` is not installed, or W&B does not let us in. Close it, or use it
    as a context.
    """

    def __init__(self, project: str, *, folder: Path, table: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("W&B needs another package: pip install 'decentral[wandb]'") from None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project, dir=str(folder), config=dict(table or {}), settings=wandb.Settings(console="off")
            )
        except wandb.Error as error:
            raise ConfigError(f"W&B: {error}; `wandb login`, or WANDB_MODE=offline to write files alone") from error
        self._curves = Curves()
        self._owners: set[str] = set()

    def __enter__(self) -> WandbWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def see(self, record: Record) -> None:
        """Log what the record adds to the curves."""
        for point in self._curves.points(record):
            if point.owner not in self._owners:  # workers are at different steps, and W&B's own step only goes up
                self._owners.add(point.owner)
                self._run.define_metric(f"{point.owner}/*", step_metric=f"{point.owner}/step")
            self._run.log({f"{point.owner}/{point.name}": point.value, f"{point.owner}/step": point.step})

    def close(self) -> None:
        """Hand in what has not been sent yet."""
        self._run.finish()
