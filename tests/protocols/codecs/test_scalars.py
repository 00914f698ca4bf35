"""A byte a number."""

from __future__ import annotations

import math

import pytest
import torch
from board import payload_of

from decentral.protocols.codecs import OneByte
from decentral.wire import FrameError, Packet

STEPS = torch.arange(-63, 64)
LEVELS = torch.exp(STEPS.double() / 8)


def test_every_byte_but_one_decodes_and_encodes_to_itself() -> None:
    codes = torch.cat([torch.arange(0, 128), torch.arange(129, 256)]).to(torch.uint8)
    decoded = OneByte().decode(Packet("one_byte", 255, 255, codes), torch.empty(255))
    assert torch.equal(payload_of(OneByte().encode(decoded)), codes)
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), LEVELS, -LEVELS])
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-7, atol=0)


def test_magnitudes_from_smallest_to_largest_arrive_within_half_a_step() -> None:
    values = torch.logspace(math.log10(3.8e-4), math.log10(2.6e3), 10_001)
    for signed in (values, -values):
        decoded = OneByte().round_trip(signed)
        assert ((decoded / signed).log().abs() <= 1 / 16 + 1e-5).all()
        assert ((decoded - signed).abs() / signed.abs()).max() == pytest.approx(math.expm1(1 / 16), abs=1e-3)
    assert LEVELS[0] == pytest.approx(3.8e-4, rel=0.01)
    assert LEVELS[-1] == pytest.approx(2.6e3, rel=0.02)


def test_larger_is_the_largest_and_smaller_is_zero() -> None:
    values = torch.tensor([2.7e3, 1e30, -3.4e38, 3.5e-4, -1e-30, 1e-45, 0.0, -0.0])
    largest = float(LEVELS[-1])
    assert OneByte().round_trip(values).tolist() == pytest.approx([largest, largest, -largest, 0, 0, 0, 0, 0])
    assert payload_of(OneByte().encode(values)).tolist() == [127, 127, 255, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_a_byte_that_is_refused(poison: float) -> None:
    packet = OneByte().encode(torch.tensor([1.0, poison]))
    assert payload_of(packet).tolist() == [64, 128]
    with pytest.raises(FrameError, match="NaN or infinity"):
        OneByte().decode(packet, torch.empty(2))
