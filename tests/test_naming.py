"""Parts by name: one spelling for run file, command line and Python."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from decentral.naming import class_named, part_named, short_names
from decentral.peer import Peer
from decentral.protocols import (
    CODECS,
    CUTS,
    OUTERS,
    RULES,
    SCHEDULES,
    TOPOLOGIES,
    Codec,
    Cut,
    DiLoCo,
    Every,
    Float32,
    Int8,
    Layers,
    Mean,
    Median,
    Merge,
    Nesterov,
    Outer,
    RandomGroups,
    Ring,
    Schedule,
    SyncRule,
    Topology,
    Whole,
)

KNOWN = ", ".join(sorted(CODECS))


class Mine(Int8):
    """Somebody's own codec."""


@pytest.mark.parametrize("known", [CODECS, CUTS, OUTERS, RULES, SCHEDULES, TOPOLOGIES])
def test_every_part_is_found_under_its_own_name_and_says_what_it_is(known: dict[str, Any]) -> None:
    for name, part in known.items():
        assert part.name == name == part.spelling()
        assert part.__doc__
        for field in part.model_fields:
            assert field.islower()


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule is not SyncRule])
def test_a_rule_is_rebuilt_from_its_table(rule: type[SyncRule]) -> None:
    made = rule()
    assert part_named(made.to_table(), RULES, SyncRule, "rule") == made


class Own(SyncRule):
    """A rule of somebody's own, whose fields are annotated with what they are."""

    period: Schedule = Every(period=20)
    codec: Codec = Int8()
    merge: Merge = Mean()
    outer: Outer = Nesterov()
    topology: Topology = RandomGroups()
    fragments: Cut = Whole()

    async def run(self, peer: Peer) -> None:
        raise NotImplementedError


def test_fields_of_a_rule_of_ones_own_take_parts_by_name() -> None:
    fields = {"period": 3, "codec": "float32", "merge": "median", "topology": "ring", "fragments": "layers"}
    given = Own(**fields, outer={"name": "nesterov", "lr": 0.5})
    assert given.period == Every(period=3)
    assert given.codec == Float32()
    assert given.merge == Median()
    assert given.outer == Nesterov(lr=0.5)
    assert given.topology == Ring()
    assert given.fragments == Layers()
    own, table = f"{__name__}:Own", given.to_table()
    assert table == {**table, "name": own, "period": {"name": "every", "period": 3}, "codec": {"name": "float32"}}
    assert part_named(table, RULES, SyncRule, "rule") == given
    with pytest.raises(ValidationError, match="unknown codec 'int7'; choose one of bf16, "):
        Own(codec="int7")


def test_a_part_is_a_name_a_table_or_itself() -> None:
    assert part_named("int8", CODECS, Codec, "codec") == Int8()
    assert part_named({"name": "int8", "block": 32}, CODECS, Codec, "codec") == Int8(block=32)
    assert part_named(Int8(block=8), CODECS, Codec, "codec") == Int8(block=8)


def test_a_part_of_ones_own_is_named_by_module_and_class() -> None:
    found = part_named({"name": "test_naming:Mine", "block": 3}, CODECS, Codec, "codec")
    assert found == Mine(block=3)
    assert found.to_table() == {"name": "test_naming:Mine", "block": 3}
    assert DiLoCo(codec="test_naming:Mine").codec == Mine()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int9", f"unknown codec 'int9'; choose one of {KNOWN}, or module:Class"),
        ({"block": 3}, f"expected the name of a codec: one of {KNOWN}, or module:Class"),
        (7, "expected the name of a codec"),
        (None, "expected the name of a codec"),
        ("nowhere:Codec", "module 'nowhere' was not found"),
        ("test_naming:Absent", "has no 'Absent'"),
        ("decentral.protocols:DiLoCo", "'decentral.protocols:DiLoCo' is not a Codec"),
        ("math:pi", "'math:pi' is not a Codec"),
    ],
)
def test_messages_say_what_there_is(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("?", r"\?")):
        part_named(value, CODECS, Codec, "codec")


def test_a_wrong_field_is_named_with_what_there_is() -> None:
    with pytest.raises(ValidationError, match=r"unknown field 'blok'; did you mean 'block'\? known fields: block"):
        part_named({"name": "int8", "blok": 3}, CODECS, Codec, "codec")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        part_named({"name": "int8", "block": 0}, CODECS, Codec, "codec")


def test_a_table_is_not_changed_by_being_read() -> None:
    table = {"name": "int8", "block": 3}
    part_named(table, CODECS, Codec, "codec")
    assert table == {"name": "int8", "block": 3}


def test_classes_alone_can_be_named() -> None:
    assert class_named("diloco", RULES, SyncRule, "rule") is DiLoCo


def test_a_rule_of_ones_own_goes_by_its_class_unless_another_has_that_name() -> None:
    assert short_names(["ddp", "a.b:Mine pull=0.5"]) == {"ddp": "ddp", "a.b:Mine pull=0.5": "Mine pull=0.5"}
    assert short_names(["a:Mine", "b:Mine"]) == {"a:Mine": "a:Mine", "b:Mine": "b:Mine"}
