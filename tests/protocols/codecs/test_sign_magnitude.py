"""Two bits a value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from board import normals, payload_of
from numpy.typing import NDArray
from torch import Tensor

from decentral.protocols.codecs import SignMagnitude, TopK
from decentral.wire import FrameError, Packet


def best_error(magnitudes: NDArray[np.float64]) -> float:
    """Return the least squared error of two magnitudes, by trying every cut of the sorted values."""
    ordered = np.sort(magnitudes)
    cuts = [np.split(ordered, [cut]) for cut in range(1, len(ordered))]
    return min(float(((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum()) for low, high in cuts)


def top(values: Tensor) -> Tensor:
    """Return the 64 largest of each 4096 values."""
    kept = TopK(values="float32").round_trip(values)
    return kept[kept != 0]


def relative_error(values: Tensor) -> float:
    return float((SignMagnitude().round_trip(values) - values).norm() / values.norm())


def student_t(size: int, degrees: int = 3) -> Tensor:
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.standard_t(degrees, size)).float()


def test_the_error_on_the_largest_of_many() -> None:
    """A coder with four equal cells comes to .108 and .59 on the same values."""
    assert relative_error(top(normals(64 * 4096))) == pytest.approx(0.065, abs=0.003)
    assert relative_error(top(student_t(64 * 4096))) == pytest.approx(0.34, abs=0.03)


def test_the_error_on_gaussian_values_is_that_of_the_lloyd_max_quantiser() -> None:
    """Max, "Quantizing for minimum distortion" (1960): distortion .1175 with four levels."""
    assert relative_error(normals(1_000_000)) == pytest.approx(math.sqrt(0.1175), rel=0.005)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [2, 3, 10, 300])
def test_no_other_two_magnitudes_are_much_better(size: int, seed: int) -> None:
    values = normals(size, seed).double().float()
    error = float((SignMagnitude(block=300).round_trip(values) - values).double().square().sum())
    best = best_error(values.abs().double().numpy())
    assert error <= 1.3 * best + 1e-10  # Lloyd's algorithm ends in a local optimum


@pytest.mark.parametrize("scale", [1e-38, 1.0, 3e38])
@pytest.mark.parametrize("size", [1, 100, 4096, 5000])
def test_magnitudes_are_means_so_what_arrives_and_what_is_lost_make_up_the_norm(size: int, scale: float) -> None:
    values = normals(size).clamp(-1, 1) * scale
    sent = SignMagnitude().round_trip(values).double()
    lost = values.double() - sent
    assert math.isclose(float(sent.square().sum() + lost.square().sum()), values.double().norm() ** 2, rel_tol=1e-5)
    assert torch.equal(sent.sign(), values.sign().double())


def test_values_of_two_magnitudes_arrive_as_they_are() -> None:
    values = torch.where(normals(5000) > 0.5, 3.0, 0.125) * normals(5000, seed=1).sign()
    torch.testing.assert_close(SignMagnitude().round_trip(values), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-45, 3.4e38, -0.1])
@pytest.mark.parametrize("size", [1, 3, 4096, 4097])
def test_equal_values_arrive_as_they_are(value: float, size: int) -> None:
    values = torch.full((size,), value)
    torch.testing.assert_close(SignMagnitude().round_trip(values), values, rtol=1e-6, atol=0)


def test_one_outlier_does_not_drown_the_others() -> None:
    values = torch.ones(4096)
    values[7] = -1e6
    decoded = SignMagnitude().round_trip(values)
    assert decoded[7] == -1e6
    assert torch.allclose(decoded[8:], torch.ones(4088), rtol=0.1)


def test_the_payload_is_two_magnitudes_a_block_and_then_sign_and_size_of_each_value() -> None:
    packet = SignMagnitude(block=4).encode(torch.tensor([1.0, -1, 5, -5, 2, 8]))
    payload = payload_of(packet)
    assert payload[:16].view(torch.float32).tolist() == [1, 5, 2, 8]
    assert payload[16:].tolist() == [0b11_01_10_00, 0b01_00]
    assert SignMagnitude().wire_bytes(8193) == 3 * 8 + 2049


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_do_not_see_each_other(block: int) -> None:
    values = normals(200)
    parts = torch.cat([SignMagnitude(block=block).round_trip(part) for part in torch.split(values, block)])
    assert torch.equal(SignMagnitude(block=block).round_trip(values), parts)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf), (0.0, math.nan)])  # noqa: PT006
def test_magnitudes_that_no_block_has_are_refused(low: float, high: float) -> None:
    packet = SignMagnitude().encode(normals(5000))
    payload_of(packet)[8:16].view(torch.float32).copy_(torch.tensor([low, high]))
    with pytest.raises(FrameError) as refused:
        SignMagnitude().decode(packet, torch.empty(5000))
    assert refused.value.code == "scale"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(poison: float) -> None:
    values = normals(5000)
    values[4500] = poison
    with pytest.raises(FrameError, match="NaN or infinity"):
        SignMagnitude().round_trip(values)


def test_random_bytes_decode_to_finite_values_or_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    codes: set[str] = set()
    for _ in range(500):
        payload = torch.randint(0, 256, (8 + 13,), dtype=torch.uint8, generator=generator)
        try:
            values = SignMagnitude().decode(Packet("sign_magnitude", 51, 21, payload), torch.empty(51))
        except FrameError as refused:
            codes.add(refused.code)
        else:
            codes.add("none")
            assert bool(torch.isfinite(values).all())
    assert codes == {"scale", "codec", "none"}
