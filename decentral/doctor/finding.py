"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
"""A problem ends a run, or keeps it from beginning; with a warning it is slower, less safe or may end later."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found, in plain words, and what to do about it; with "ok" there is nothing to do."""

    check: str
    level: Level
    what: str
    advice: str = ""
