"""Who takes part in a comparison: rules, rules under several settings, and controls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.protocols import Every, Float32, LocalSGD

ALONE = "one_worker"
"""The control that trains on the fleet's first worker alone, by itself."""

Entry = tuple[str, Run]
"""A name in the comparison, and the run under that rule and settings."""


def entries_of(run: Run, names: Sequence[str], vary: Sequence[str] = (), controls: bool = False) -> list[Entry]:
    """Return the run under each rule, all checked before any starts; raises `ConfigError`.

    `names` are rules, or tables of the run file's `compare` that name one. Each of `vary`, such as
    "rule.period=10,50", multiplies the entries that have this field. `controls` adds those of `controls_of`.
    """
    if not names:
        raise ConfigError("--rules: name at least one rule, such as --rules ddp,diloco")
    for name in run.compare:
        if name not in names:
            raise ConfigError(f"compare.{name}: no such rule in --rules {','.join(names)}")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"--rules: {', '.join(doubled)} named twice")
    entries = [(name, run.with_rule(name)) for name in names]
    varied = _varied(entries, [_axis(each) for each in vary]) if vary else entries
    return varied + controls_of(entries) if controls else varied


def controls_of(entries: Sequence[Entry]) -> list[Entry]:
    """Return runs that say what communication is worth: the fleet's first worker alone.

    `one_worker` trains as any worker does and never talks. For each entry with an outer optimiser there is one that
    has this optimiser too, `one_worker_<entry>`: what it gains over `one_worker` is not the other workers' doing.
    """
    _, first = entries[0]
    plain = LocalSGD(period=Every(period=first.evaluate_every or first.steps), codec=Float32())
    controls = [(ALONE, _alone(first, plain))]
    for name, run in entries:
        if "outer" in type(run.rule).model_fields:
            controls.append((f"{ALONE}_{name}", _alone(run, run.rule)))
    return controls


def folder_name(name: str) -> str:
    """Return the name as that of a folder on any system."""
    return re.sub(r"[^\w.=+-]+", ".", name)


def _alone(run: Run, rule: object) -> Run:
    fleet = run.fleet
    first = fleet.workers[0].model_copy(update={"count": 1, "start_s": 0.0, "site": None})
    nobody_else = {"events": (), "churn": None, "network": type(fleet.network)(), "prices": type(fleet.prices)()}
    changes = {"workers": (first,), "latency_s": 0.0, **nobody_else}
    alone = run.model_copy(update={"fleet": fleet.model_copy(update=changes), "rule": rule})
    try:
        alone.check()
    except ConfigError as error:
        raise ConfigError(f"--controls: {error}") from error
    return alone


def _axis(text: str) -> tuple[str, list[str]]:
    """Return the field that `field=value,value` names, and its values as TOML."""
    field, equals, values = text.partition("=")
    field = field.strip()
    items = _items(values)
    if not equals or not all(items) or not re.fullmatch(r"(rule|inner)(\.\w+)+", field):
        raise ConfigError(
            f"--vary {text}: expected a field of the rule or of the inner optimiser and its values, such as "
            "--vary rule.period=10,50; for another task or fleet give several run files"
        )
    return field, items


def _items(values: str) -> list[str]:
    """Return what stands between commas, those in tables, arrays and strings aside."""
    items, depth, quote = [""], 0, ""
    for letter in values:
        if letter == "," and not depth and not quote:
            items.append("")
            continue
        items[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
    return [item.strip() for item in items]


def _varied(entries: Sequence[Entry], axes: Sequence[tuple[str, list[str]]]) -> list[Entry]:
    for field, _ in axes:
        if not any(_has(run, field) for _, run in entries):
            raise ConfigError(f"--vary {field}: none of {', '.join(name for name, _ in entries)} has this field")
    varied = []
    for name, run in entries:
        own = [[(field, value) for value in values] for field, values in axes if _has(run, field)]
        for chosen in product(*own):
            label = " ".join([name, *(f"{field.rpartition('.')[2]}={value}" for field, value in chosen)])
            overrides = [f"{field}={value}" for field, value in chosen]
            varied.append((label, run.changed(overrides, f"--vary, {label}") if chosen else run))
    return varied


def _has(run: Run, field: str) -> bool:
    part, name, *_ = field.split(".")
    return name in type(getattr(run, part)).model_fields
