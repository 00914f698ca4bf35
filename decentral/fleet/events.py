"""What befalls workers, and when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from decentral.part import Section


class Event(Section):
    """Something that befalls a worker of a simulated run."""

    at_s: float = Field(ge=0, allow_inf_nan=False)
    """When, in seconds after the start."""
    kind: Literal["crash"] = "crash"
    """"crash": the worker is gone in mid-sentence; the others find out `detection_s` later."""
    worker: int = Field(ge=0)
