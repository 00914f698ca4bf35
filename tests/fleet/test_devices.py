"""Devices by name, and what a group of workers may say of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from decentral.config import validated
from decentral.errors import ConfigError
from decentral.fleet import WorkerGroup
from decentral.fleet.devices import Dtype, device_named, devices

ASKED_FOR = ["V100", "T4", "A10G", "A100-40", "A100-80", "H100", "H200", "L4", "RTX3090", "RTX4090", "CPU-core"]


def test_all_devices_have_figures_and_say_where_from() -> None:
    assert list(devices()) == ASKED_FOR
    for name, device in devices().items():
        assert "float32" in device.peak_flops, name
        assert device.sheet, name
        assert (device.prices is not None) == (device.dollars_per_hour is not None), name
        if device.spot_dollars_per_hour is not None:
            assert device.dollars_per_hour is not None, name
            assert device.spot_dollars_per_hour < device.dollars_per_hour, name


def test_narrower_numbers_are_never_slower() -> None:
    order: list[Dtype] = ["float32", "tf32", "float16", "float8"]
    for device in devices().values():
        peaks = [device.peak_flops[dtype] for dtype in order if dtype in device.peak_flops]
        assert peaks == sorted(peaks)


def test_figures_that_everybody_knows() -> None:
    a100 = device_named("A100-80")
    assert (a100.peak_flops["bfloat16"], a100.memory_gib, a100.watts) == (312e12, 80, 400)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"device": "a100-80"}, "unknown device 'a100-80'; did you mean 'A100-80'? devices: V100"),
        ({"device": "TPU"}, "unknown device 'TPU'; devices: V100"),
        ({"device": "V100"}, 'device = "V100" needs mfu'),
        (
            {"device": "V100", "mfu": 0.4, "dtype": "bfloat16"},
            'no peak for dtype = "bfloat16"; it has float32, float16',
        ),
        ({"device": "V100", "mfu": 1.4}, "less than or equal to 1"),
        ({"device": "V100", "mfu": 0.4, "step_time_s": 1}, "mfu and step_time_s both say how long a step takes"),
        ({"mfu": 0.4}, "mfu needs a device"),
        ({"dtype": "float16"}, "dtype needs a device"),
        ({"step_time_s": 0}, "greater than 0"),
        ({"start_s": -1}, "greater than or equal to 0"),
        ({"slowing": {"per_hour": 0.1}}, "floor"),
        ({"slowing": {"per_hour": 0.1, "floor": 0}}, "greater than 0"),
        ({"stalls": {"per_hour": 0, "duration_s": 1}}, "greater than 0"),
        ({"stalls": {"per_hours": 1, "duration_s": 1}}, "did you mean 'per_hour'?"),
    ],
)
def test_a_wrong_group_is_refused(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        WorkerGroup(**group)
    assert words in str(caught.value)


def test_a_device_needs_to_know_how_much_work_a_step_is() -> None:
    fleet: dict[str, Any] = {"workers": [{"device": "A100-80", "dtype": "bfloat16", "mfu": 0.4}]}
    table = {"rule": "diloco", "task": {"name": "quadratic"}, "fleet": fleet}
    with pytest.raises(ConfigError, match=r"run: fleet\.workers\.0\.device: the step time of A100-80 cannot be told"):
        validated(table, "run")
    assert validated({**table, "fleet": {**fleet, "step_flops": 1e12}}, "run").fleet.step_flops == 1e12
    assert validated({**table, "task": {"name": "byte_gpt"}}, "run").fleet.step_flops is None
