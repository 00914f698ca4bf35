"""E3M0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from board import normals, payload_of
from torch import Tensor

from decentral.protocols.codecs import E3M0
from decentral.wire import FrameError

MAGNITUDES = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
CODEBOOK = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES[1:])], dtype=torch.float64)


def beside_sixteen(*elements: float) -> list[float]:
    """Return what the elements arrive as in a block whose largest element is 16: of scale 1."""
    return E3M0().round_trip(torch.tensor([16.0, *elements]))[1:].tolist()


def nearest(values: Tensor, block: int) -> Tensor:
    """Return the nearest multiple of each block's scale in the codebook, by looking at all of them."""
    decoded = []
    for part in values.double().split(block):
        entries = CODEBOOK * part.abs().max() / 16
        decoded.append(entries[(part[:, None] - entries[None, :]).abs().argmin(dim=1)])
    return torch.cat(decoded).float()


def test_what_is_in_the_codebook_is_exact() -> None:
    both = [*MAGNITUDES, *(-m for m in MAGNITUDES)]
    assert beside_sixteen(*both) == both


@pytest.mark.parametrize("sign", [1, -1])
def test_elements_go_to_the_nearest_entry_on_the_line(sign: int) -> None:
    elements = [0.124, 0.126, 0.374, 0.376, 0.74, 0.76, 1.49, 1.51, 2.99, 3.01, 5.99, 6.01, 11.99, 12.01, 0.17, 1e-30]
    expected = [0, 0.25, 0.25, 0.5, 0.5, 1, 1, 2, 2, 4, 4, 8, 8, 16, 0.25, 0]
    assert beside_sixteen(*(sign * element for element in elements)) == [sign * element for element in expected]


def test_ties_go_away_from_zero() -> None:
    ties = [0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0]
    assert beside_sixteen(*ties) == MAGNITUDES[1:]
    assert beside_sixteen(*(-tie for tie in ties)) == [-m for m in MAGNITUDES[1:]]


@pytest.mark.parametrize("block", [2, 30, 1024])
@pytest.mark.parametrize("size", [1, 2, 29, 30, 31, 5001])
def test_it_is_the_nearest_of_all_entries(block: int, size: int) -> None:
    values = normals(size) * torch.logspace(-4, 4, size)
    decoded = E3M0(block=block).round_trip(values)
    assert torch.allclose(decoded, nearest(values, block), rtol=3e-7, atol=0)


def test_the_bytes() -> None:
    """Scale 2 as float32; then codes 7 15, 1 9, 0 4 and a spare half, low half first; then the bias."""
    values = torch.tensor([32.0, -32.0, 0.5, -0.5, -0.2, 4.0, -1.0])
    payload = payload_of(E3M0().encode(values))
    assert payload.tolist() == [0x00, 0x00, 0x00, 0x40, 0xF7, 0x91, 0x40, 0x0A, 3]


def test_fifteen_values_come_out_and_none_is_minus_zero() -> None:
    decoded = E3M0(block=20_000).round_trip(normals(20_000))
    assert len(decoded.unique()) == 15
    assert not bool(torch.signbit(decoded[decoded == 0]).any())


def test_the_relative_error_is_at_most_a_third_down_to_a_hundred_and_twenty_eighth() -> None:
    magnitudes = torch.linspace(16 / 128 * 1.0001, 16, 20_000)
    values = torch.cat((magnitudes, -magnitudes))
    inside = values.abs() >= 0.1876  # below it the neighbour is 0.25, of which more than a third may be missing
    error = ((E3M0(block=40_000).round_trip(values) - values) / values).abs()
    assert 0.333 < float(error[inside].max()) <= 1 / 3 + 1e-6
    assert float(error.max()) <= 1


@pytest.mark.parametrize(("block", "expected"), [(32, 0.033), (128, 0.037), (1024, 0.038), (65536, 0.038)])
def test_the_error_on_normal_elements(block: int, expected: float) -> None:
    values = normals(200_000)
    decoded = E3M0(block=block).round_trip(values)
    assert float((decoded - values).square().mean()) == pytest.approx(expected, abs=0.001)
    assert float(torch.cosine_similarity(decoded, values, dim=0)) == pytest.approx(0.982, abs=0.002)


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 23, 24, 25, 39, 40, 41, 1000])
def test_blocks_of_subnormals_are_off_by_little(steps: int) -> None:
    """Multiples of the smallest float: the scale is a multiple of it too, and 0 below 9 of them."""
    values = torch.arange(-steps, steps + 1).double().mul(2.0**-149).float()
    decoded = E3M0().round_trip(values)
    assert bool(torch.isfinite(decoded).all())
    assert float((decoded - values).double().norm() / values.double().norm()) < (0.7 if steps > 8 else 1 + 1e-9)
    assert torch.equal(decoded[values == 0], torch.zeros(1))


@pytest.mark.parametrize("bias", [0, 2, 4, 255])
def test_another_bias_is_refused(bias: int) -> None:
    packet = E3M0().encode(normals(1000))
    payload_of(packet)[-1] = bias
    with pytest.raises(FrameError, match=f"has exponent bias 3, not {bias}") as refused:
        E3M0().decode(packet, torch.empty(1000))
    assert refused.value.code == "codec"


def test_every_code_but_minus_zero_decodes_to_its_entry() -> None:
    """Read with nothing but the definition: sign bit, three bits of exponent, bias 3."""
    codes = np.array([code for code in range(16) if code != 8] + [7])
    packet = E3M0().encode(torch.full((16,), 16.0))
    payload_of(packet)[4:12] = torch.from_numpy((codes[0::2] | codes[1::2] << 4).astype(np.uint8))
    expected = [(-1) ** (code >> 3) * (2.0 ** ((code & 7) - 3) if code & 7 else 0.0) for code in codes.tolist()]
    assert E3M0().decode(packet, torch.empty(16)).tolist() == expected
