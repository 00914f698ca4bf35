"""`Part`: what tasks, rules, codecs and the other pluggable pieces have in common.

A part is a frozen value whose fields are its hyper-parameters. The run file, the command line and a Python call
spell them alike, are checked alike and fail with the same message. A part never holds run-time state.
"""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Part(BaseModel):
    """A frozen, validated value: `DiLoCo(period=50)` raises `pydantic.ValidationError` on an unknown or bad field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str] = ""
    """How a run file calls the built-in part. A part of the user's own is called `module:Class`."""

    chosen: ClassVar[bool] = True
    """Whether a run file chooses this part among others by name; a section of it is not chosen."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Say which fields there are, where pydantic would only say that one is not."""
        if isinstance(data, dict):
            for field in data:
                if field not in cls.model_fields:
                    near = difflib.get_close_matches(str(field), cls.model_fields, 1)
                    hint = f"did you mean '{near[0]}'? " if near else ""
                    known = ", ".join(cls.model_fields) or "none"
                    raise ValueError(f"unknown field '{field}'; {hint}known fields: {known}")
        return data

    @classmethod
    def spelling(cls) -> str:
        """Return the name under which a run file finds this class."""
        return cls.__dict__.get("name") or f"{cls.__module__}:{cls.__qualname__}"

    def to_table(self) -> dict[str, Any]:
        """Return the part as a run file spells it: name and every field, defaults too; unset fields are left out."""
        table: dict[str, Any] = {"name": self.spelling()} if self.chosen else {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if value is not None:
                table[field] = _plain(value)
        return table


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_table()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, (bool, int, float, str)) else str(value)


class Section(Part):
    """A part that is a section of the run file, always there and never chosen by name."""

    chosen = False
