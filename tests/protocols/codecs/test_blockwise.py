"""int8 and int4, and what all codecs with scaled blocks have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from board import normals, payload_of
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from decentral.protocols.codecs import E3M0, Dynamic8, Int4, Int8
from decentral.protocols.codecs.blockwise import RUN, Blockwise
from decentral.wire import FrameError, Packet

LINEAR = [(Int8(), 127), (Int4(), 7)]
FAMILY = [Int8(), Int4(), Dynamic8(), E3M0()]
linear = pytest.mark.parametrize(("codec", "top"), LINEAR, ids=["int8", "int4"])
whole_family = pytest.mark.parametrize("codec", FAMILY, ids=lambda codec: codec.name)


def reference(values: NDArray[np.float32], block: int, top: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return (scales, quantised) of the definition q = round(top x / max|x|), one block after the other."""
    scales, quantised = [], []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = np.abs(part).max()
        ratio = part / scale if scale > 0 else np.zeros_like(part)
        scales.append(scale)
        quantised.append(np.rint(ratio * np.float32(top)).astype(np.int8))
    return np.array(scales, dtype=np.float32), np.concatenate(quantised)


def parts(codec: Blockwise, values: Tensor) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return the scales and the bytes behind them."""
    payload = payload_of(codec.encode(values)).numpy()
    scales = 4 * -(-len(values) // codec.block)
    return payload[:scales].view(np.float32), payload[scales:]


def signed_nibbles(packed: NDArray[np.uint8], numel: int) -> NDArray[np.int8]:
    """Return the two's complement numbers of four bits, the low half of a byte first."""
    nibbles = np.stack((packed & 15, packed >> 4), axis=1).reshape(-1)[:numel].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


def with_scale(codec: Blockwise, scale: float, numel: int = 300) -> Packet:
    packet = codec.encode(normals(numel))
    payload_of(packet)[4:8] = torch.tensor([scale]).view(torch.uint8)
    return packet


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_int8_bytes_are_the_numpy_references(block: int, size: int) -> None:
    values = normals(size) * torch.logspace(-6, 6, size)
    scales, codes = parts(Int8(block=block), values)
    expected_scales, expected = reference(values.numpy(), block, 127)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes.view(np.int8), expected)
    decoded = Int8(block=block).round_trip(values)
    mine = expected.astype(np.float64) / 127 * np.repeat(expected_scales.astype(np.float64), block)[:size]
    assert np.allclose(decoded.numpy(), mine, rtol=3e-7, atol=0)


@pytest.mark.parametrize("block", [2, 6, 128])
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 1001])
def test_int4_bytes_are_the_numpy_references(block: int, size: int) -> None:
    values = normals(size) * torch.logspace(-6, 6, size)
    scales, codes = parts(Int4(block=block), values)
    expected_scales, expected = reference(values.numpy(), block, 7)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(signed_nibbles(codes, size), expected)
    assert len(codes) == (size + 1) // 2
    decoded = Int4(block=block).round_trip(values)
    mine = expected.astype(np.float64) / 7 * np.repeat(expected_scales.astype(np.float64), block)[:size]
    assert np.allclose(decoded.numpy(), mine, rtol=3e-7, atol=0)


@whole_family
@pytest.mark.parametrize("numel", [RUN, RUN + 1, 2 * RUN + 5001])
def test_a_long_vector_is_coded_block_by_block(codec: Blockwise, numel: int) -> None:
    """However much of the vector is worked on at a time, each block comes out as if it travelled alone."""
    values = normals(numel)
    decoded, blocks = codec.round_trip(values), codec.block
    for start in {0, RUN // blocks * blocks - blocks, RUN // blocks * blocks, (numel - 1) // blocks * blocks}:
        block = slice(start, start + blocks)
        assert torch.equal(decoded[block], codec.round_trip(values[block]))


def test_a_block_longer_than_a_run() -> None:
    values = normals(2 * RUN + 7)
    scales, codes = parts(Int8(block=2 * RUN), values)
    expected_scales, expected = reference(values.numpy(), 2 * RUN, 127)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes.view(np.int8), expected)


@linear
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e38, 1e-37, 1e-40, 1.4e-45])
@pytest.mark.parametrize("size", [7, 256, 300])
def test_the_error_is_at_most_half_a_step_of_the_block(codec: Blockwise, top: int, scale: float, size: int) -> None:
    """Half a step is max|x| / (2 top); float32 adds its rounding, a step of 2^-149 when even that is subnormal."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1).mul_(scale)
    error = (codec.round_trip(values).double() - values.double()).abs()
    for start in range(0, size, codec.block):
        largest = values[start : start + codec.block].abs().max().double()
        assert error[start : start + codec.block].max() <= largest / (2 * top) * (1 + 2**-14) + 2**-149


@linear
@pytest.mark.parametrize("scale", [1.0, 0.7, 1e-30, 1e-38, 1e-42, 3.3e38])
def test_the_largest_element_is_exact(codec: Blockwise, top: int, scale: float) -> None:
    values = normals(300).clamp(-2, 2) / 4 * scale
    values[5], values[290] = scale, -scale
    decoded = codec.round_trip(values)
    assert (decoded[5], decoded[290]) == (values[5], values[290])


def test_ties_go_to_even() -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert parts(Int8(), values)[1].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert signed_nibbles(parts(Int4(), values * 7 / 127)[1], 1).tolist() == [7]
    assert signed_nibbles(parts(Int4(), values.clamp(max=7))[1], 7).tolist() == [7, 0, 2, 2, 0, -2, -2]


def test_nibbles_are_packed_low_half_first() -> None:
    values = torch.tensor([7.0, -7.0, 1.0, -1.0, 3.0])
    assert parts(Int4(), values)[1].tolist() == [0x97, 0xF1, 0x03]


@whole_family
def test_a_block_of_zeros_is_zeros_and_others_keep_their_own_scale(codec: Blockwise) -> None:
    values = torch.zeros(3 * codec.block)
    values[codec.block : 2 * codec.block] = 2.0**-10
    values[2 * codec.block :] = 2.0**10
    assert torch.equal(codec.round_trip(values), values)


@whole_family
@pytest.mark.parametrize("power", [-100, -20, -1, 1, 20, 100])
def test_a_scale_by_a_power_of_two_leaves_the_codes(codec: Blockwise, power: int) -> None:
    values = normals(5000)
    scaled = values * 2.0**power
    assert np.array_equal(parts(codec, values)[1], parts(codec, scaled)[1])
    assert torch.equal(codec.round_trip(scaled), codec.round_trip(values) * 2.0**power)


@whole_family
def test_blocks_do_not_see_each_other(codec: Blockwise) -> None:
    block = codec.block
    values = normals(3 * block)
    other = values.clone()
    other[block : 2 * block] = 1e6
    first, second = codec.round_trip(values), codec.round_trip(other)
    assert torch.equal(first[:block], second[:block])
    assert torch.equal(first[2 * block :], second[2 * block :])


@whole_family
def test_blocks_near_the_largest_float_stay_finite(codec: Blockwise) -> None:
    largest = torch.finfo(torch.float32).max
    values = normals(5000).clamp(-3, 3) / 3 * largest
    values[0], values[1] = largest, -largest
    decoded = codec.round_trip(values)
    assert decoded[0] == largest
    assert float((decoded / largest - values / largest).norm() / (values / largest).norm()) < 0.3


@whole_family
@pytest.mark.parametrize("scale", [-1.0, -1e-45, float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_none_is_refused(codec: Blockwise, scale: float) -> None:
    numel = 2 * codec.block
    with pytest.raises(FrameError) as refused:
        codec.decode(with_scale(codec, scale, numel), torch.empty(numel))
    assert refused.value.code == "scale"


@pytest.mark.parametrize("numel", [1000, 1001])
@pytest.mark.parametrize(
    ("codec", "byte"), [(Int8(), 0x80), (Int4(), 0x08), (Int4(), 0x80), (E3M0(), 0x08), (E3M0(), 0x80)]
)
def test_a_code_that_is_never_written_is_refused(codec: Blockwise, byte: int, numel: int) -> None:
    packet = codec.encode(normals(numel))
    payload_of(packet)[4 * -(-numel // codec.block) + 100] = byte
    with pytest.raises(FrameError) as refused:
        codec.decode(packet, torch.empty(numel))
    assert refused.value.code == "codec"


@pytest.mark.parametrize(("codec", "behind"), [(Int4(), 0), (E3M0(), 1)], ids=["int4", "e3m0"])
@pytest.mark.parametrize("high", [1, 8, 15])
def test_a_spare_half_byte_that_is_not_zero_is_refused(codec: Blockwise, behind: int, high: int) -> None:
    packet = codec.encode(normals(1001))
    payload_of(packet)[-1 - behind] |= high << 4
    with pytest.raises(FrameError) as refused:
        codec.decode(packet, torch.empty(1001))
    assert refused.value.code == "codec"


def test_the_same_codec_with_another_block_is_refused() -> None:
    with pytest.raises(FrameError, match="expected 1000 elements in 1016 bytes"):
        Int8().decode(Int8(block=100).encode(normals(1000)), normals(1000))


@pytest.mark.parametrize("codec", [Int4, E3M0])
def test_blocks_of_half_bytes_have_an_even_length(codec: type[Blockwise]) -> None:
    with pytest.raises(ValidationError, match="multiple of 2"):
        codec(block=5)


def test_sizes() -> None:
    sizes = {codec.name: codec.wire_bytes(4096) for codec in FAMILY}
    assert sizes == {
        "int8": 4096 + 4 * 16,
        "int4": 2048 + 4 * 32,
        "dynamic8": 4096 + 4 * 2,
        "e3m0": 2048 + 4 * 4 + 1,
    }


def test_int8_is_bitsandbytes_with_the_linear_map() -> None:
    """Scales are equal, and elements too, to rounding; in 2 of 4196 places ours is the nearer one."""
    recorded = np.load(Path(__file__).parent / "fixtures" / "bitsandbytes.npz")
    values = recorded["values"]
    scales, _ = parts(Int8(), torch.from_numpy(values))
    assert np.array_equal(scales, recorded["linear_scales"])
    step = np.repeat(scales.astype(np.float64), 256)[: len(values)] / 127
    mine, theirs = Int8().round_trip(torch.from_numpy(values)).numpy() / step, recorded["linear_decoded"] / step
    differ = np.abs(mine - theirs) > 1e-4
    assert differ.sum() == 2
    assert (np.abs(mine - values / step) < np.abs(theirs - values / step))[differ].all()
