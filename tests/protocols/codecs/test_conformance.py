"""What it means to be a codec: every one in `CODECS` passes this."""

from __future__ import annotations

import math

import pytest
import torch
from board import normals, payload_of
from pydantic import TypeAdapter
from torch import Tensor

from decentral.phantom import Phantom
from decentral.protocols import CODECS, BFloat16, Codec, Float32, Int8
from decentral.protocols.codecs import E3M0, Float16, Int4, Wrapper
from decentral.wire import FrameError, Packet, signal

SIZES = [0, 1, 2, 255, 256, 257, 1000, 100_003]
ALL = [codec(codec=CODECS["topk"]()) if issubclass(codec, Wrapper) else codec() for codec in CODECS.values()]
BUILT_IN = tuple(ALL)
ALL += [Int8(block=1), Int8(block=100), Int4(block=2), E3M0(block=30)]
LOSSLESS_AGAIN = [Float32(), BFloat16(), Float16(), Int8(), Int4(), E3M0()]


def label(codec: Codec) -> str:
    return f"{codec.name}{getattr(codec, 'block', '')}"


every_codec = pytest.mark.parametrize("codec", ALL, ids=label)
every_size = pytest.mark.parametrize("size", SIZES)


def on_the_wire(codec: Codec) -> str:
    """Return the codec name that its packets bear: a wrapper's are those of the codec inside."""
    return codec.codec.name if isinstance(codec, Wrapper) else codec.name


@every_codec
@every_size
def test_the_payload_is_as_long_as_declared(codec: Codec, size: int) -> None:
    packet = codec.encode(normals(size))
    assert packet.nbytes == codec.wire_bytes(size) == payload_of(packet).numel()
    assert (packet.codec, packet.numel) == (on_the_wire(codec), size)
    assert payload_of(packet).dtype == torch.uint8
    assert payload_of(packet).is_contiguous()


@every_codec
@every_size
def test_decoding_is_deterministic_and_has_the_length_of_the_input(codec: Codec, size: int) -> None:
    values = normals(size)
    first, second = codec.encode(values), codec.encode(values.clone())
    assert torch.equal(payload_of(first), payload_of(second))
    decoded = codec.decode(first, values)
    assert torch.equal(decoded, codec.decode(second, torch.empty(size)))
    assert torch.equal(decoded, codec.round_trip(values))
    assert (decoded.shape, decoded.dtype) == ((size,), torch.float32)


@every_codec
def test_who_reads_a_packet_later_finds_what_was_decoded_and_who_decodes_it_has_values_of_its_own(codec: Codec) -> None:
    packet, like = codec.encode(normals(1000)), torch.empty(1000)
    first = codec.read(packet, like)
    assert codec.read(packet, like).data_ptr() == first.data_ptr()
    codec.decode(packet, like).add_(1)
    codec.read(packet, like, into=torch.empty(1000)).add_(1)
    assert torch.equal(codec.read(packet, like), codec.decode(codec.encode(normals(1000)), like))
    with pytest.raises(FrameError, match="expected 999 elements"):
        codec.read(packet, torch.empty(999))


@every_codec
def test_everybody_has_the_same_where_it_is_written_whoever_reads_first(codec: Codec) -> None:
    packet, like = codec.encode(normals(1000)), torch.empty(1000)
    places = [torch.full((1000,), math.nan) for _ in range(3)]
    for place in places:
        codec.read(packet, like, into=place)
    assert all(torch.equal(place, codec.decode(packet, like)) for place in places)
    with pytest.raises(FrameError):
        codec.read(Packet("another", 1000, packet.nbytes, packet.payload), like, into=places[0])


@pytest.mark.parametrize("codec", BUILT_IN, ids=label)
def test_the_loss_is_of_the_kind_declared(codec: Codec) -> None:
    values = normals(4096)
    decoded = codec.fit([(64, 64)]).round_trip(values)
    error = float((decoded - values).norm() / values.norm())
    loss = codec.codec.loss if isinstance(codec, Wrapper) else codec.loss
    if loss == "none":
        assert torch.equal(decoded, values)
    elif loss == "rounding":
        assert 0 < error < 0.5
    elif loss == "contractive":
        assert 0 < error < 1
    else:  # a large error, but no part of it along the vector: that one is small on the average of a few vectors
        along = [float(codec.round_trip(x) @ x / (x @ x)) for x in (normals(4096, seed) for seed in range(20))]
        assert error > 1
        assert abs(sum(along) / len(along) - 1) < 0.1


@pytest.mark.parametrize("codec", BUILT_IN, ids=label)
def test_bytes_are_saved_where_something_is_lost(codec: Codec) -> None:
    """A codec that silently does nothing is the worst failure."""
    nbytes = payload_of(codec.fit([(64, 64)]).encode(normals(4096))).numel()
    if codec.loss == "none":
        assert nbytes == 4 * 4096
    else:
        assert nbytes <= 2 * 4096


@pytest.mark.parametrize("codec", LOSSLESS_AGAIN, ids=label)
@every_size
def test_a_decoded_vector_survives_another_trip_unchanged(codec: Codec, size: int) -> None:
    once = codec.round_trip(normals(size))
    assert torch.equal(codec.round_trip(once), once)


@pytest.mark.parametrize("codec", [codec for codec in ALL if codec.grain], ids=label)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_cut_at_a_multiple_of_the_grain_changes_no_element(codec: Codec, cut: int) -> None:
    values = normals(3 * codec.grain + codec.grain // 3)
    first, second = values[: cut * codec.grain], values[cut * codec.grain :]
    assert torch.equal(torch.cat((codec.round_trip(first), codec.round_trip(second))), codec.round_trip(values))


@every_codec
def test_a_packet_shares_nothing_with_the_vector(codec: Codec) -> None:
    values = normals(1000)
    packet = codec.encode(values)
    before = codec.decode(packet, values).clone()
    values.fill_(7.0)
    decoded = codec.decode(packet, values)
    assert torch.equal(decoded, before)
    decoded.fill_(9.0)
    assert torch.equal(codec.decode(packet, values), before)


@every_codec
def test_encoding_leaves_the_vector_alone(codec: Codec) -> None:
    values = normals(1000)
    kept = values.clone()
    codec.encode(values)
    assert torch.equal(values, kept)


@every_codec
def test_decoding_leaves_the_packet_alone(codec: Codec) -> None:
    packet = codec.encode(normals(1001))
    kept = payload_of(packet).clone()
    codec.decode(packet, torch.empty(1001))
    assert torch.equal(payload_of(packet), kept)


@every_codec
def test_views_and_strides_are_encoded_like_copies(codec: Codec) -> None:
    flat = normals(3000)
    for view in (flat[1:1002], flat[::3], flat.view(3, 1000).T.reshape(-1), flat.expand(1, 3000)[0]):
        assert torch.equal(payload_of(codec.encode(view)), payload_of(codec.encode(view.clone())))


@every_codec
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (7, 11), (2, 3, 5)])
def test_any_shape_travels_as_its_flat_vector(codec: Codec, shape: tuple[int, ...]) -> None:
    values = normals(math.prod(shape)).view(shape)
    packet = codec.encode(values)
    assert torch.equal(payload_of(packet), payload_of(codec.encode(values.reshape(-1))))
    decoded = codec.decode(packet, values)
    assert decoded.shape == shape
    assert torch.equal(decoded.reshape(-1), codec.decode(packet, values.reshape(-1)))


@every_codec
def test_a_transposed_matrix_travels_in_the_order_of_its_elements(codec: Codec) -> None:
    matrix = normals(700).view(20, 35).T
    assert torch.equal(payload_of(codec.encode(matrix)), payload_of(codec.encode(matrix.contiguous())))
    assert codec.round_trip(matrix).shape == (35, 20)


@every_codec
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_float_dtypes_travel_as_float32(codec: Codec, dtype: torch.dtype) -> None:
    values = normals(1000).to(dtype)
    packet = codec.encode(values)
    assert torch.equal(payload_of(packet), payload_of(codec.encode(values.float())))
    assert codec.decode(packet, values).dtype == torch.float32


@every_codec
def test_a_vector_that_wants_a_gradient_can_travel(codec: Codec) -> None:
    values = normals(10).requires_grad_()
    assert not codec.decode(codec.encode(values), values).requires_grad


@every_codec
@every_size
def test_a_phantom_makes_a_packet_of_the_same_size(codec: Codec, size: int) -> None:
    phantom = Phantom(size)
    packet = codec.encode(phantom)  # type: ignore[arg-type]
    real = codec.encode(normals(size))
    assert (packet.codec, packet.numel, packet.nbytes, packet.payload) == (real.codec, real.numel, real.nbytes, None)
    assert len(codec.decode(packet, phantom)) == size  # type: ignore[arg-type]


@every_codec
def test_what_was_not_agreed_on_is_refused(codec: Codec) -> None:
    values = normals(100)
    good = codec.encode(values)
    short = payload_of(good)[:-1]
    wrong = [
        Packet("unheard_of", good.numel, good.nbytes, good.payload),
        Packet(good.codec, 99, good.nbytes, good.payload),
        Packet(good.codec, 99, codec.wire_bytes(99), payload_of(good)[: codec.wire_bytes(99)]),
        Packet(good.codec, good.numel, good.nbytes - 1, short),
        Packet(good.codec, good.numel, good.nbytes, short),
        Packet(good.codec, good.numel, good.nbytes, None),
        signal("no"),
    ]
    for packet in wrong:
        with pytest.raises(FrameError):
            codec.decode(packet, values)
    for other in ALL:
        if on_the_wire(other) != on_the_wire(codec):
            with pytest.raises(FrameError, match=f"codec '{on_the_wire(codec)}'"):
                codec.decode(other.encode(values), values)


@every_codec
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 255, 256, 999])
def test_what_is_not_finite_is_refused_by_the_receiver(codec: Codec, poison: float, place: int) -> None:
    values = normals(1000)
    values[place] = poison
    with pytest.raises(FrameError) as refused:
        codec.decode(codec.encode(values), values)
    assert refused.value.code in ("not_finite", "scale")


def decodes_to_finite_values_or_is_refused(codec: Codec, payload: Tensor, numel: int) -> bool:
    """Return whether the payload was decoded; what a hostile worker sends may do nothing but these two."""
    try:
        decoded = codec.decode(Packet(on_the_wire(codec), numel, payload.numel(), payload), torch.empty(numel))
    except FrameError:
        return False
    assert bool(torch.isfinite(decoded).all())
    return True


@every_codec
@pytest.mark.parametrize("numel", [1, 50, 51])
def test_random_bytes_decode_to_finite_values_or_are_refused(codec: Codec, numel: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        payload = torch.randint(0, 256, (codec.wire_bytes(numel),), dtype=torch.uint8, generator=generator)
        decodes_to_finite_values_or_is_refused(codec, payload, numel)


@every_codec
def test_one_flipped_bit_decodes_to_finite_values_or_is_refused(codec: Codec) -> None:
    good = payload_of(codec.encode(normals(51)))
    for place in range(0, 8 * len(good), 7):
        payload = good.clone()
        payload[place // 8] ^= 1 << place % 8
        decodes_to_finite_values_or_is_refused(codec, payload, 51)
    assert decodes_to_finite_values_or_is_refused(codec, good, 51)


@every_codec
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-20])
def test_tiny_vectors_stay_finite(codec: Codec, scale: float) -> None:
    decoded = codec.round_trip(normals(700) * scale)
    assert bool(torch.isfinite(decoded).all())
    assert float(decoded.abs().max()) <= 100 * scale


@pytest.mark.parametrize("named", ["int8", {"name": "int8"}, {"name": "int8", "block": 256}, Int8()])
def test_a_codec_may_be_named(named: object) -> None:
    assert TypeAdapter(Codec).validate_python(named) == Int8()
