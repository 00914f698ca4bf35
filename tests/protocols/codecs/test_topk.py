"""Top-k of each chunk, and how indices are packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from board import normals, payload_of
from pydantic import ValidationError
from torch import Tensor

from decentral.protocols.codecs import Float32, Int8, SignMagnitude, TopK
from decentral.protocols.codecs.bits import pack_bits, packed_bytes, unpack_bits
from decentral.wire import FrameError

EXACT = TopK(values="float32")


def reference(values: Tensor, k: int, chunk: int) -> Tensor:
    """Return the vector with all but the k largest magnitudes of each chunk zeroed; a stable sort breaks ties."""
    kept = torch.zeros_like(values)
    for start in range(0, len(values), chunk):
        order = np.argsort(-values[start : start + chunk].abs().numpy(), kind="stable")[:k] + start
        kept[order] = values[order]
    return kept


# -- numbers of a few bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 25))
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_packed_numbers_are_the_digits_of_one_long_integer(width: int, count: int) -> None:
    generator = torch.Generator().manual_seed(width)
    numbers = torch.randint(0, 1 << width, (count,), generator=generator)
    numbers[::3], numbers[1::5] = (1 << width) - 1, 0
    payload = torch.empty(packed_bytes(count, width), dtype=torch.uint8)
    pack_bits(numbers, width, payload)
    whole = sum(number << width * place for place, number in enumerate(numbers.tolist()))
    assert int.from_bytes(bytes(payload.tolist()), "little") == whole
    assert unpack_bits(payload, width, count).tolist() == numbers.tolist()


def test_every_index_of_twelve_bits_survives_in_either_place_of_a_pair() -> None:
    numbers = torch.stack([torch.arange(4096), torch.arange(4095, -1, -1)]).T.reshape(-1)
    payload = torch.empty(packed_bytes(8192, 12), dtype=torch.uint8)
    pack_bits(numbers, 12, payload)
    assert len(payload) == 8192 * 12 // 8
    assert torch.equal(unpack_bits(payload, 12, 8192).long(), numbers)


def test_bits_behind_the_last_number_are_refused() -> None:
    payload = torch.zeros(2, dtype=torch.uint8)
    payload[1] = 0x80
    assert unpack_bits(payload, 4, 4).tolist() == [0, 0, 0, 8]
    with pytest.raises(FrameError) as refused:
        unpack_bits(payload, 4, 3)
    assert refused.value.code == "codec"


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "chunk"), [(1, 1), (1, 2), (3, 7), (64, 64), (5, 100), (60, 100), (64, 4096)])
@pytest.mark.parametrize("size", [1, 2, 64, 65, 101, 4096, 4099, 10_000])
def test_the_largest_of_each_chunk_arrive_as_they_are(k: int, chunk: int, size: int) -> None:
    values = normals(size)
    assert torch.equal(TopK(k=k, chunk=chunk, values="float32").round_trip(values), reference(values, k, chunk))


@pytest.mark.parametrize("seed", range(10))
def test_ties_go_to_the_lower_index(seed: int) -> None:
    values = torch.randint(-2, 3, (5000,), generator=torch.Generator().manual_seed(seed)).float()
    codec = TopK(k=40, chunk=100, values="float32")
    assert torch.equal(codec.round_trip(values), reference(values, 40, 100))
    packet = TopK(k=2, chunk=4, values="float32").encode(torch.tensor([1.0, -1, 1, 1, 0, 0, 0, 0]))
    assert payload_of(packet)[16:].tolist() == [0b0100_0100]  # 0 and 1 of both chunks, two bits each


def test_any_codec_that_brings_every_value_carries_the_values() -> None:
    values = normals(8192)
    kept = reference(values, 64, 4096)
    for inner in (Int8(), SignMagnitude(), Float32()):
        decoded = TopK(values=inner).round_trip(values)
        assert torch.equal(decoded[decoded != 0], inner.round_trip(kept[kept != 0]))


@pytest.mark.parametrize("values", ["topk", "sketch", "powersgd", {"name": "error_feedback", "codec": "int8"}])
def test_codecs_that_leave_values_out_or_remember_are_refused(values: object) -> None:
    with pytest.raises(ValidationError, match="leaves values out or has a memory"):
        TopK(values=values)


def test_more_than_a_chunk_cannot_be_kept() -> None:
    with pytest.raises(ValidationError, match="k = 65 elements cannot be chosen among a chunk of 64"):
        TopK(k=65, chunk=64)


# -- how much is lost, and how much is saved --------------------------------------------------------------------------


def test_what_is_sent_and_what_is_left_make_up_the_norm() -> None:
    values = normals(10_000)
    sent = EXACT.round_trip(values)
    left = values - sent
    assert math.isclose(float(sent.double().square().sum() + left.double().square().sum()), values.double().norm() ** 2)


@pytest.mark.parametrize(("k", "chunk"), [(3, 10), (64, 4096), (1, 50)])
def test_the_contraction_is_tight_when_all_magnitudes_are_equal(k: int, chunk: int) -> None:
    values = torch.where(normals(10 * chunk) > 0, 2.0, -2.0)
    left = values - TopK(k=k, chunk=chunk, values="float32").round_trip(values)
    assert math.isclose(float(left.square().sum() / values.square().sum()), 1 - k / chunk, rel_tol=1e-6)
    assert (normals(1000) - EXACT.round_trip(normals(1000))).norm() <= normals(1000).norm()


def test_the_default_is_more_than_a_hundred_times_smaller_than_float32() -> None:
    assert 4_000_000 / TopK().wire_bytes(1_000_000) > 100
    assert 4 * 4096 * 64 / TopK().wire_bytes(4096 * 64) == pytest.approx(146.1, abs=0.1)


@pytest.mark.parametrize(
    ("k", "chunk", "numel", "index_bytes"),
    [
        (64, 4096, 8192, 2 * 64 * 12 // 8),
        (512, 4096, 8192, 2 * 4096 // 8),  # 512 x 12 bits are more than 4096
        (3, 5, 15, 2),  # 15 bits: a bitmap, where three bits each would be 27
        (1, 5, 15, 2),  # nine bits
        (4, 4, 100, 0),  # all of them: nobody asks which
        (3, 5, 17, 2),  # two are left and both travel
        (3, 5, 19, 3),  # four are left, of which three travel: four more bits
        (7, 100, 1100, 68),  # 77 x 7 bits
    ],
)
def test_indices_take_the_shorter_of_two_forms(k: int, chunk: int, numel: int, index_bytes: int) -> None:
    codec = TopK(k=k, chunk=chunk, values="float32")
    kept = sum(min(k, numel - start, chunk) for start in range(0, numel, chunk))
    assert codec.wire_bytes(numel) == 4 * kept + index_bytes
    assert torch.equal(codec.round_trip(normals(numel)), reference(normals(numel), k, chunk))


@pytest.mark.parametrize("values", ["float32", "int8", {"name": "sign_magnitude", "block": 96}])
def test_a_cut_at_the_grain_changes_nothing(values: object) -> None:
    codec = TopK(k=6, chunk=50, values=values)
    vector = normals(3 * codec.grain + 77)
    parts = torch.cat([codec.round_trip(part) for part in torch.split(vector, codec.grain)])
    assert torch.equal(parts, codec.round_trip(vector))
    assert EXACT.grain == 4096
    assert TopK(values=SignMagnitude(block=64)).grain == 4096


def test_seed_and_scalar_pairs_of_a_zeroth_order_rule_travel_exactly() -> None:
    """FedKSeed (2312.06353): of K candidate seeds a client used tau, and sends what each of them came to."""
    pool, used = 4096, 200
    sums = torch.zeros(pool)
    sums[torch.randperm(pool, generator=torch.Generator().manual_seed(1))[:used]] = 1e3 * normals(used)
    codec = TopK(k=used, chunk=pool, values="float32")
    assert torch.equal(codec.round_trip(sums), sums)
    assert codec.wire_bytes(pool) == used * (4 + 1.5)


# -- hostile packets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[0, 5, 3], [2, 2, 3], [0, 1, 100], [0, 1, 127], [99, 98, 97]])
def test_indices_that_do_not_ascend_or_go_beyond_the_chunk_are_refused(indices: list[int]) -> None:
    codec = TopK(k=3, chunk=100, values="float32")
    packet = codec.encode(normals(100))
    pack_bits(torch.tensor(indices), 7, payload_of(packet)[12:])
    with pytest.raises(FrameError) as refused:
        codec.decode(packet, torch.empty(100))
    assert refused.value.code == "index"
    pack_bits(torch.tensor([0, 98, 99]), 7, payload_of(packet)[12:])
    assert codec.decode(packet, torch.empty(100)).nonzero().flatten().tolist() == [0, 98, 99]


def test_a_bitmap_with_too_many_ones_is_refused() -> None:
    codec = TopK(k=3, chunk=6, values="float32")
    packet = codec.encode(normals(12))
    payload_of(packet)[-2] |= 0b11111  # the other chunk has fewer or as many
    with pytest.raises(FrameError) as refused:
        codec.decode(packet, torch.empty(12))
    assert refused.value.code == "index"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_always_among_the_largest_and_refused(poison: float) -> None:
    values = 1e30 * normals(5000)
    values[4000] = poison
    for codec in (TopK(), EXACT, TopK(values="int8")):
        with pytest.raises(FrameError):
            codec.round_trip(values)


def test_a_packet_of_another_k_is_refused() -> None:
    with pytest.raises(FrameError, match="expected 1000 elements"):
        TopK().decode(TopK(k=8).encode(normals(1000)), torch.empty(1000))
