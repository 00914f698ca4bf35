"""Devices by name: what their data sheets and price lists say.

All figures are nominal: peaks of dense matrix products at boost clocks, board power, list prices of one day. Which
sheet, which provider and which day stands with each figure in `data/devices.json`. Real training reaches a share of the
peak (`mfu`), and prices of spot machines change daily: give a group what you know better.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Literal, get_args

from decentral.fleet.units import PositiveNumber
from decentral.naming import nearest
from decentral.part import Section

Dtype = Literal["float32", "tf32", "bfloat16", "float16", "float8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class Device(Section):
    """One kind of accelerator, or one CPU core."""

    peak_flops: dict[Dtype, PositiveNumber]
    """Peak floating-point operations a second by number format, without sparsity."""
    memory_gib: PositiveNumber
    """Memory in GiB."""
    watts: PositiveNumber
    """Board power (TDP)."""
    dollars_per_hour: PositiveNumber | None = None
    """List price on demand in US dollars an hour, for the smallest machine with the device or its share of one."""
    spot_dollars_per_hour: PositiveNumber | None = None
    """The same for a spot machine, on the day of the price list; unset: not published there."""
    sheet: str
    """Where peaks, memory and power are from."""
    prices: str | None = None
    """Where prices are from: provider, machine, region, day."""


@lru_cache(maxsize=1)
def devices() -> dict[str, Device]:
    """Return all devices by name."""
    text = (resources.files("decentral.fleet") / "data" / "devices.json").read_text(encoding="utf-8")
    return {name: Device.model_validate(fields) for name, fields in json.loads(text)["devices"].items()}


def device_named(name: str) -> Device:
    """Return the device of that name; raises `ValueError`, which suggests the nearest name."""
    known = devices()
    if name not in known:
        raise ValueError(f"unknown device '{name}'; {nearest(name, known)}devices: {', '.join(known)}")
    return known[name]
