"""A part's fields as the reference shows them: name, type and what is allowed, default, meaning."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from decentral.part import Part, Section
from decentral.protocols import Every
from website.families import FAMILIES, link
from website.tables import code, escaped, table

LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
}
"""Words of JSON schema for what a number may be."""
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "table"}
"""JSON schema's types, as a reader calls them."""


PARTS = {cls.__name__: link(family) for family in FAMILIES for cls in (family.base, *family.base.__subclasses__())}
"""Links to the parts of a family, by the class that a field asks for."""


class Described(NamedTuple):
    """One field: its name, its type and what is allowed, its default as a run file spells it, what it means."""

    key: str
    kind: str
    default: str
    meaning: str


def described(part: type[Part]) -> list[Described]:
    """Return the fields of a part in their order, in Markdown; `meaning` is "" where no class says what a field is."""
    schema = part.model_json_schema()
    kinds = _Kinds(schema.get("$defs", {}))
    return [
        Described(code(name), kinds.of(schema["properties"][name]), _shown(field), escaped(_meaning(part, name)))
        for name, field in part.model_fields.items()
    ]


def fields_table(part: type[Part]) -> str:
    """Return the table of a part's fields, "" if it has none."""
    return table(("field", "type", "default", "meaning"), described(part))


def sections_of(part: type[Part]) -> Iterator[tuple[str, type[Section], bool]]:
    """Yield (field, its section, whether there may be several) for each field that is a section, or made of them."""
    for name, field in part.model_fields.items():
        for section in _sections(field.annotation):
            yield name, section, get_origin(field.annotation) is tuple


def spelled(value: Any) -> str:
    """Return a value as a run file spells it; of a part's fields those that differ from its defaults."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        short = f"{value:g}"
        return (short if float(short) == value else repr(value)).replace("e+0", "e").replace("e+", "e")
    if isinstance(value, Every):
        return spelled(value.period)
    if isinstance(value, Part):
        fields = type(value).model_fields.items()
        changed = {name: found for name, field in fields if (found := getattr(value, name)) != _default(field)}
        if value.chosen and not changed:
            return spelled(value.spelling())
        return spelled({"name": value.spelling(), **changed} if value.chosen else changed)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(spelled(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {spelled(item)}' for key, item in value.items())}}}"
    return f'"{value}"'


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = _default(field)
    if default is None:
        return "unset"
    return "as below" if isinstance(default, Section) else code(spelled(default))


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _meaning(part: type[Part], name: str) -> str:
    """Return the docstring below the field, of the nearest class that has one."""
    return next((found for cls in part.__mro__ if issubclass(cls, Part) and (found := _docstrings(cls).get(name))), "")


@functools.cache
def _docstrings(cls: type[Part]) -> dict[str, str]:
    """Return what stands below each field in the class's source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


class _Kinds:
    """Words for JSON schemas; `definitions` are those that they refer to."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions

    def of(self, schema: Mapping[str, Any]) -> str:
        if "$ref" in schema:
            return self._referred(schema["$ref"].rpartition("/")[2])
        if "anyOf" in schema:
            return " or ".join(self.of(one) for one in schema["anyOf"] if one.get("type") != "null")
        if "enum" in schema or "const" in schema:
            return ", ".join(spelled(value) for value in schema.get("enum", [schema.get("const")]))
        if schema.get("type") == "array":
            items = schema.get("prefixItems") or [schema.get("items", {})]
            return f"list; each: {', '.join(dict.fromkeys(self.of(item) for item in items))}"
        words = [TYPES.get(schema.get("type", ""), "anything")]
        words += [text.format(spelled(schema[key])) for key, text in LIMITS.items() if key in schema]
        return ", ".join(words)

    def _referred(self, name: str) -> str:
        schema = self._definitions[name]
        return PARTS.get(name, "table") if schema.get("type") == "object" else self.of(schema)
