"""Dynamic 8-bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from board import normals, payload_of
from numpy.typing import NDArray
from torch import Tensor

from decentral.protocols.codecs import Dynamic8, Int8

RECORDED = np.load(Path(__file__).parent / "fixtures" / "bitsandbytes.npz")


def codebook() -> NDArray[np.float32]:
    """Return what the 256 codes decode to in a block of scale 1."""
    packet = Dynamic8().encode(torch.ones(256))
    payload_of(packet)[4:] = torch.arange(256)
    return Dynamic8().decode(packet, torch.empty(256)).numpy()


def codes(values: Tensor, block: int = 2048) -> NDArray[np.uint8]:
    return payload_of(Dynamic8(block=block).encode(values)).numpy()[4 * -(-len(values) // block) :]


def student(size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).standard_t(3, size).astype(np.float32))


def test_the_map_is_that_of_the_paper() -> None:
    expected = {0.0, 1.0}
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        expected |= set(middles) | set(-middles)
    assert len(expected) == len(set(codebook())) == 256
    assert np.allclose(codebook(), sorted(expected), rtol=2e-7, atol=0)


def test_the_map_is_that_of_bitsandbytes_to_a_rounding() -> None:
    assert np.allclose(codebook(), RECORDED["dynamic_codebook"], rtol=2e-7, atol=0)


def test_every_code_survives() -> None:
    for scale in (1.0, 0.37, 1e-20, 1e30):
        values = torch.from_numpy(codebook()) * scale
        assert codes(values).tolist() == list(range(256))


@pytest.mark.parametrize("draw", [normals, student], ids=["normal", "student"])
def test_the_nearest_of_all_entries_is_taken(draw: object) -> None:
    values = draw(4000)  # type: ignore[operator]
    book = codebook().astype(np.float64)
    chosen = codes(values, block=4000)
    ratios = (values / values.abs().max()).numpy().astype(np.float64)
    distances = np.abs(ratios[:, None] - book[None, :])
    assert np.array_equal(distances[np.arange(4000), chosen], distances.min(axis=1))


def test_both_sides_of_every_threshold() -> None:
    """The floats next to the middle between two entries; in the middle the larger magnitude is taken."""
    book = codebook().astype(np.float64)
    middles = (book[1:] + book[:-1]) / 2
    for side in (-np.inf, np.inf):
        values = np.nextafter(middles.astype(np.float32), np.float32(side))
        values = np.append(values, np.float32(1))
        expected = np.abs(values[:, None].astype(np.float64) - book[None, :]).argmin(axis=1)
        assert codes(torch.from_numpy(values)).tolist() == expected.tolist()
    exact = np.flatnonzero(middles == middles.astype(np.float32))
    assert len(exact) > 0
    found = codes(torch.from_numpy(np.append(middles[exact], 1.0).astype(np.float32)))[:-1]
    assert found.tolist() == [middle + (middles[middle] > 0) for middle in exact]


def test_an_extreme_is_exact_if_positive_and_a_little_off_if_negative() -> None:
    decoded = Dynamic8(block=2).round_trip(torch.tensor([3.0, 0.0, -3.0, 0.0]))
    assert decoded[0] == 3.0
    assert float(decoded[2]) == pytest.approx(-3 * 0.99296875)


@pytest.mark.parametrize(("decade", "bound"), [(0, 0.063), (1, 0.11), (2, 0.18), (3, 0.29)])
def test_the_relative_error_by_decade(decade: int, bound: float) -> None:
    magnitudes = torch.logspace(-decade - 1, -decade, 2000)
    values = torch.cat((magnitudes, -magnitudes, torch.ones(1)))
    error = ((Dynamic8(block=4001).round_trip(values) - values) / values).abs().max()
    assert bound / 2 < float(error) <= bound


def test_heavy_tails_fare_better_than_with_int8_and_normals_worse() -> None:
    def median_error(codec: Dynamic8 | Int8, values: Tensor) -> float:
        return float(((codec.round_trip(values) - values) / values).abs().median())

    def error(codec: Dynamic8 | Int8, values: Tensor) -> float:
        return float((codec.round_trip(values) - values).norm() / values.norm())

    heavy = normals(50_000) ** 5
    assert median_error(Dynamic8(), heavy) < 0.1 < 0.9 < median_error(Int8(block=2048), heavy)
    assert error(Int8(block=2048), normals(50_000)) < error(Dynamic8(), normals(50_000)) < 0.015


def test_it_is_bitsandbytes() -> None:
    """Scales are equal, and codes but in 17 of 4196 places, where ours is the nearer one."""
    values = RECORDED["values"]
    payload = payload_of(Dynamic8().encode(torch.from_numpy(values))).numpy()
    assert np.array_equal(payload[:12].view(np.float32), RECORDED["dynamic_scales"])
    mine, theirs = payload[12:], RECORDED["dynamic_codes"]
    differ = mine != theirs
    assert differ.sum() == 17
    ratios = values.astype(np.float64) / np.repeat(RECORDED["dynamic_scales"].astype(np.float64), 2048)[: len(values)]
    book = codebook().astype(np.float64)
    assert (np.abs(book[mine] - ratios) < np.abs(book[theirs] - ratios))[differ].all()
    decoded = Dynamic8().round_trip(torch.from_numpy(values)).numpy()
    assert np.allclose(decoded[~differ], RECORDED["dynamic_decoded"][~differ], rtol=4e-7, atol=0)
