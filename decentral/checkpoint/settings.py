"""What a run file says of checkpoints."""

from __future__ import annotations

from pydantic import Field

from decentral.part import Section


class Checkpoints(Section):
    """Where a run keeps its state, and how often."""

    url: str = ""
    """A folder, or a URL that fsspec knows: "s3://bucket/run", "gs://bucket/run". All machines must be able to write
    there. Empty: no checkpoints."""
    every_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds between two checkpoints; the next one waits until the last one is written."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay; older ones are removed when a new one is whole."""
