"""float32, bfloat16 and float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from board import normals, payload_of

from decentral.protocols.codecs import BFloat16, Float16, Float32
from decentral.wire import FrameError


def test_float32_is_the_bytes_of_the_elements() -> None:
    values = normals(100)
    assert bytes(payload_of(Float32().encode(values)).tolist()) == values.numpy().tobytes()


def test_bf16_overflow_is_refused() -> None:
    with pytest.raises(FrameError):
        BFloat16().round_trip(torch.tensor([3.4e38]))


def test_bf16_rounds_to_nearest_with_ties_to_even() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])
    assert BFloat16().round_trip(values).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_f16_is_numpys_half() -> None:
    values = normals(5000) * torch.logspace(-9, 4, 5000)
    payload = payload_of(Float16().encode(values)).numpy().view(np.float16)
    assert np.array_equal(payload, values.numpy().astype(np.float16))


def test_f16_keeps_what_is_too_large_at_the_largest_half() -> None:
    values = torch.tensor([65504.0, 65519.0, 65520.0, -1e5, 3.4e38, -3.4e38, 1.0, 2**-24, 2**-26])
    expected = [65504.0, 65504.0, 65504.0, -65504.0, 65504.0, -65504.0, 1.0, 2**-24, 0.0]
    assert Float16().round_trip(values).tolist() == expected


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_f16_does_not_hide_what_is_not_finite_among_large_values(poison: float) -> None:
    with pytest.raises(FrameError) as refused:
        Float16().round_trip(torch.tensor([1e6, poison, -1e6]))
    assert refused.value.code == "not_finite"


@pytest.mark.parametrize(("codec", "error"), [(BFloat16(), 2**-8), (Float16(), 2**-11)], ids=["bf16", "f16"])
def test_the_relative_error_is_at_most_half_a_step(codec: BFloat16 | Float16, error: float) -> None:
    values = normals(5000)
    values = values[values.abs() > 2**-14]
    assert float(((codec.round_trip(values) - values) / values).abs().max()) <= error
