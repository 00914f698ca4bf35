"""Parts by name: how `codec = "int8"` or `codec = {name = "int8", block = 128}` becomes an object."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function

from decentral.loading import load
from decentral.part import Part

P = TypeVar("P", bound=Part)


class Kind(Part):
    """A kind of parts, of which a run file chooses one by name.

    A field annotated with the kind, as in `codec: Codec = Int8()`, takes a part of it, a name, or a table of a name and
    the part's fields.
    """

    called: ClassVar[str]
    """What one of them is called in messages."""
    built_in: ClassVar[dict[str, type[Any]]]
    """Those that need no module, by the names that run files use."""

    @classmethod
    def named(cls, value: Any) -> Any:
        """Return the part of this kind that `value` names; raises as `part_named` does."""
        return part_named(value, cls.built_in, cls, cls.called)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        return no_info_before_validator_function(cls.named, schema) if "built_in" in vars(cls) else schema


def part_named(value: Any, known: Mapping[str, type[P]], base: type[Any], what: str) -> P:
    """Return the part that `value` names: a part already, a name, or a table with `name` and the part's fields.

    A name is one of `known`, or `module:Class` for a part of the user's own. Raises `ValueError` (which pydantic turns
    into a message with the field's place) when there is no such part, and `ValidationError` when a field is wrong.
    """
    if isinstance(value, base):
        found: P = value
        return found
    fields = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a {what}: one of {', '.join(sorted(known))}, or module:Class")
    return class_named(name, known, base, what)(**fields)


def class_named(name: str, known: Mapping[str, type[P]], base: type[Any], what: str) -> type[P]:
    """Return the class that `name` stands for; raises `ValueError` when there is none."""
    if name in known:
        return known[name]
    if ":" not in name:
        raise ValueError(f"unknown {what} '{name}'; choose one of {', '.join(sorted(known))}, or module:Class")
    found = load(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"'{name}' is not a {base.__name__}")
    cls: type[P] = found
    return cls


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return what parts are called where there is little room: a `module:Class` by its class, if no two are alike."""
    short = {name: name.rpartition(":")[2] for name in names}
    return short if len({*short.values()}) == len(short) else {name: name for name in short}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'? " for the known name that is most like this one, whatever its case; "" for none."""
    by_folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, 1)
    return f"did you mean '{by_folded[near[0]]}'? " if near else ""
