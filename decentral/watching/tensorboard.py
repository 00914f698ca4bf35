"""A run's curves for TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from decentral.errors import ConfigError
from decentral.journal import Record
from decentral.watching.curves import Curves

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class TensorBoardWriter:
    """Writes event files below `folder`, a sub-folder for each worker, so that one chart shows them all.

    Raises `ConfigError` where the extra `decentral[tensorboard]` is not installed. Close it, or use it as a context.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            raise ConfigError("TensorBoard needs another package: pip install 'decentral[tensorboard]'") from None
        self._folder = folder
        self._began = time.time()
        self._curves = Curves()
        self._writers: dict[str, SummaryWriter] = {}

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def see(self, record: Record) -> None:
        """Write what the record adds to the curves; its time of day is the run's, virtual in the simulator."""
        for point in self._curves.points(record):
            writer = self._writers.get(point.owner) or self._open(point.owner)
            writer.add_scalar(point.name, point.value, point.step, walltime=self._began + point.time_s)

    def close(self) -> None:
        """Write what is not yet on the disk."""
        for writer in self._writers.values():
            writer.close()

    def _open(self, owner: str) -> SummaryWriter:
        from tensorboardX import SummaryWriter

        writer = self._writers[owner] = SummaryWriter(str(self._folder / owner.replace(" ", "-")))
        return writer
