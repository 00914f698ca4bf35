"""What a run file says of checkpoints."""

from __future__ import annotations

from pydantic import Field

from decentral.part import Section

WRITING_S = 600.0
"""Seconds that making one checkpoint may take, or as long as lies between two, if that is longer."""


class Checkpoints(Section):
    """Where a run keeps its state, and how often."""

    url: str = ""
    """A folder, or a URL that fsspec knows: "s3://bucket/run", "gs://bucket/run". All machines must be able to write
    there. Empty: no checkpoints."""
    every_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds between two checkpoints; the next one waits until the last one is written."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay; older ones are removed when a new one is whole."""

    @property
    def writing_s(self) -> float:
        """Seconds after which a checkpoint that is not written is given up."""
        return max(WRITING_S, self.every_s)
