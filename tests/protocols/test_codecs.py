"""What it means to be a codec: every one in `CODECS` passes this. Then int8 by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from decentral.phantom import Phantom
from decentral.protocols import CODECS, BFloat16, Codec, Float32, Int8
from decentral.protocols.codecs import CodecField
from decentral.wire import FrameError, Packet, signal

SIZES = [0, 1, 2, 255, 256, 257, 1000, 100_003]
ALL = [*(codec() for codec in CODECS.values()), Int8(block=1), Int8(block=100)]
LOSSLESS_AGAIN = [Float32(), BFloat16(), Int8()]
every_codec = pytest.mark.parametrize("codec", ALL, ids=lambda codec: f"{codec.name}{getattr(codec, 'block', '')}")
every_size = pytest.mark.parametrize("size", SIZES)


def normals(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def payload_of(packet: Packet) -> Tensor:
    assert packet.payload is not None
    return packet.payload


@every_codec
@every_size
def test_the_payload_is_as_long_as_declared(codec: Codec, size: int) -> None:
    packet = codec.encode(normals(size))
    assert packet.nbytes == codec.wire_bytes(size) == payload_of(packet).numel()
    assert (packet.codec, packet.numel) == (codec.name, size)
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
def test_decoding_is_close_to_the_input(codec: Codec) -> None:
    values = normals(5000)
    error = (codec.round_trip(values) - values).norm() / values.norm()
    assert error < {"float32": 1e-30, "bf16": 2**-9, "int8": 0.01}[codec.name]


@pytest.mark.parametrize("codec", LOSSLESS_AGAIN, ids=lambda codec: codec.name)
@every_size
def test_a_decoded_vector_survives_another_trip_unchanged(codec: Codec, size: int) -> None:
    once = codec.round_trip(normals(size))
    assert torch.equal(codec.round_trip(once), once)


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
def test_views_and_strides_are_encoded_like_copies(codec: Codec) -> None:
    flat = normals(3000)
    for view in (flat[1:1002], flat[::3], flat.view(3, 1000).T.reshape(-1), flat.expand(1, 3000)[0]):
        assert torch.equal(payload_of(codec.encode(view)), payload_of(codec.encode(view.clone())))


@every_codec
def test_a_vector_that_wants_a_gradient_can_travel(codec: Codec) -> None:
    values = normals(10).requires_grad_()
    assert not codec.decode(codec.encode(values), values).requires_grad


def test_bytes_are_really_saved() -> None:
    """A codec that silently does nothing is the worst failure."""
    sizes = {name: payload_of(codec().encode(normals(4096))).numel() for name, codec in CODECS.items()}
    assert sizes == {"float32": 4 * 4096, "bf16": 2 * 4096, "int8": 4096 + 4 * 16}
    assert not torch.equal(BFloat16().round_trip(normals(100)), normals(100))
    assert not torch.equal(Int8().round_trip(normals(100)), normals(100))
    assert torch.equal(Float32().round_trip(normals(100)), normals(100))


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
        Packet("top_k", good.numel, good.nbytes, good.payload),
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
        if other.name != codec.name:
            with pytest.raises(FrameError, match=f"codec '{codec.name}'"):
                codec.decode(other.encode(values), values)


def test_the_same_codec_with_another_block_is_refused() -> None:
    with pytest.raises(FrameError, match="expected 1000 elements in 1016 bytes"):
        Int8().decode(Int8(block=100).encode(normals(1000)), normals(1000))


@every_codec
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 255, 256, 999])
def test_what_is_not_finite_is_refused_by_the_receiver(codec: Codec, poison: float, place: int) -> None:
    values = normals(1000)
    values[place] = poison
    with pytest.raises(FrameError, match="NaN or infinity"):
        codec.decode(codec.encode(values), values)


def test_bf16_overflow_is_refused() -> None:
    with pytest.raises(FrameError):
        BFloat16().round_trip(torch.tensor([3.4e38]))


def test_bf16_rounds_to_nearest_with_ties_to_even() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])
    assert BFloat16().round_trip(values).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


@pytest.mark.parametrize("named", ["int8", {"name": "int8"}, {"name": "int8", "block": 256}, Int8()])
def test_a_codec_may_be_named(named: object) -> None:
    from pydantic import TypeAdapter

    assert TypeAdapter(CodecField).validate_python(named) == Int8()


# -- int8 -------------------------------------------------------------------------------------------------------------


def numpy_int8(values: NDArray[np.float32], block: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return (scales, quantised) of the definition q = round(127 x / max|x|), one block after the other."""
    scales, quantised = [], []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = np.abs(part).max()
        ratio = part / scale if scale > 0 else np.zeros_like(part)
        scales.append(scale)
        quantised.append(np.rint(ratio * np.float32(127)).astype(np.int8))
    return np.array(scales, dtype=np.float32), np.concatenate(quantised)


def parts(codec: Int8, values: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    payload = payload_of(codec.encode(values)).numpy()
    scales = 4 * -(-len(values) // codec.block)
    return payload[:scales].view(np.float32), payload[scales:].view(np.int8)


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_int8_bytes_are_the_numpy_references(block: int, size: int) -> None:
    values = normals(size) * torch.logspace(-6, 6, size)
    scales, quantised = parts(Int8(block=block), values)
    expected_scales, expected = numpy_int8(values.numpy(), block)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(quantised, expected)
    decoded = Int8(block=block).round_trip(values)
    mine = expected.astype(np.float64) / 127 * np.repeat(expected_scales.astype(np.float64), block)[:size]
    assert np.allclose(decoded.numpy(), mine, rtol=3e-7, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e38, 1e-37, 1e-40, 1.4e-45])
@pytest.mark.parametrize("size", [7, 256, 300])
def test_the_error_is_at_most_half_a_step_of_the_block(scale: float, size: int) -> None:
    """Half a step is max|x| / 254; float32 adds its rounding, a step of 2^-149 when even that is subnormal."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1).mul_(scale)
    error = (Int8().round_trip(values).double() - values.double()).abs()
    for start in range(0, size, 256):
        largest = values[start : start + 256].abs().max().double()
        assert error[start : start + 256].max() <= largest / 254 * (1 + 2**-14) + 2**-149


@pytest.mark.parametrize("scale", [1.0, 0.7, 1e-30, 1e-38, 1e-42, 3.3e38])
def test_the_largest_element_is_exact(scale: float) -> None:
    values = normals(300).clamp(-2, 2) / 4 * scale
    values[5], values[290] = scale, -scale
    decoded = Int8().round_trip(values)
    assert (decoded[5], decoded[290]) == (values[5], values[290])


def test_ties_go_to_even() -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert parts(Int8(), values)[1].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_a_block_of_zeros_is_zeros_and_others_keep_their_own_scale() -> None:
    values = torch.zeros(600)
    values[256:512] = 1e-3
    values[512:] = 1e3
    assert torch.equal(Int8().round_trip(values), values)
    assert np.allclose(parts(Int8(), values)[0], [0, 1e-3, 1e3])


@pytest.mark.parametrize("power", [-100, -20, -1, 1, 20, 100])
def test_a_scale_by_a_power_of_two_leaves_the_quantised_bytes(power: int) -> None:
    values = normals(700)
    scaled = values * 2.0**power
    assert np.array_equal(parts(Int8(), values)[1], parts(Int8(), scaled)[1])
    assert torch.equal(Int8().round_trip(scaled), Int8().round_trip(values) * 2.0**power)


def test_blocks_do_not_see_each_other() -> None:
    values = normals(600)
    other = values.clone()
    other[256:512] = 1e6
    first, second = Int8().round_trip(values), Int8().round_trip(other)
    assert torch.equal(first[:256], second[:256])
    assert torch.equal(first[512:], second[512:])


def test_random_bytes_never_decode_to_what_is_not_finite() -> None:
    """Whatever a hostile worker sends: finite values or `FrameError`, nothing else."""
    generator = torch.Generator().manual_seed(3)
    for codec in ALL:
        for _ in range(30):
            nbytes = codec.wire_bytes(50)
            payload = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
            try:
                decoded = codec.decode(Packet(codec.name, 50, nbytes, payload), torch.empty(50))
            except FrameError:
                continue
            assert bool(torch.isfinite(decoded).all())
