"""Top-k of the cosine transform of tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from board import coders_of, normals, payload_of
from numpy.typing import NDArray
from torch import Tensor

from decentral.phantom import Phantom
from decentral.protocols.codecs import DCT, ErrorFeedback
from decentral.wire import FrameError, Packet

Shape = tuple[int, ...]


def cosines(size: int) -> NDArray[np.float64]:
    """Return the DCT-II matrix of its definition, one number after the other."""
    matrix = np.empty((size, size))
    for u in range(size):
        for j in range(size):
            matrix[u, j] = math.sqrt((2 if u else 1) / size) * math.cos(math.pi * (2 * j + 1) * u / (2 * size))
    return matrix


def coefficients(values: NDArray[np.float64], tile: tuple[int, int]) -> NDArray[np.float64]:
    """Return the tiles' coefficients of a matrix, tile after tile."""
    height, width = tile
    rows, columns = values.shape
    return np.concatenate(
        [
            (cosines(height) @ values[top : top + height, left : left + width] @ cosines(width).T).ravel()
            for top in range(0, rows, height)
            for left in range(0, columns, width)
        ]
    )


TILES: list[tuple[Shape, Shape, tuple[int, int]]] = [
    ((64, 64), (64, 64), (64, 64)),
    ((128, 192), (128, 192), (64, 64)),
    ((29, 768), (29, 768), (29, 64)),
    ((97, 10), (97, 10), (1, 10)),  # a prime side
    ((251, 97), (251, 97), (1, 1)),
    ((6, 3, 5, 5), (6, 75), (6, 25)),  # a convolution: first x rest
    ((130, 2, 5), (130, 10), (26, 10)),
    ((1, 128), (2, 64), (1, 64)),
    ((128,), (2, 64), (1, 64)),
    ((), (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("shape", "matrix", "tile"), TILES)
def test_the_transform_is_the_cosine_transform_of_each_tile(shape: Shape, matrix: Shape, tile: tuple[int, int]) -> None:
    values = normals(math.prod(shape))
    codec = DCT().fit([shape])
    expected = coefficients(values.double().numpy().reshape(matrix), tile)
    assert np.allclose(codec.transform(values).numpy(), expected, atol=1e-5)
    (rows,) = codec.rows(len(values))
    assert (rows.length, rows.kept) == (math.prod(tile), min(32, math.prod(tile)))


def test_a_vector_is_cut_into_pieces_of_64_and_a_rest() -> None:
    values = normals(64 + 10)
    expected = np.concatenate(
        [coefficients(part.double().numpy()[None], (1, len(part))) for part in torch.split(values, 64)]
    )
    assert np.allclose(DCT().transform(values).numpy(), expected, atol=1e-5)
    assert np.allclose(DCT().fit([(74,)]).transform(values).numpy(), expected, atol=1e-5)


MODEL = [(128, 64), (128,), (7, 97), (), (8, 3, 4, 4), (0, 5), (3,)]
NUMEL = 128 * 64 + 128 + 7 * 97 + 1 + 8 * 48 + 3


def test_each_tensor_has_tiles_of_its_own() -> None:
    values = normals(NUMEL)
    codec = DCT(k=5).fit(MODEL)
    start = 0
    for shape in MODEL:
        part = values[start : start + math.prod(shape)]
        if len(part):
            alone = DCT(k=5).fit([shape]).round_trip(part)
            assert torch.equal(codec.round_trip(values)[start : start + len(part)], alone)
        start += len(part)


@pytest.mark.parametrize("values", ["float32", "int8", "sign_magnitude"])
def test_a_round_trip_is_what_the_receiver_decodes(values: str) -> None:
    codec, sent = DCT(k=5, values=values).fit(MODEL), normals(NUMEL)
    assert torch.equal(codec.round_trip(sent), codec.decode(codec.encode(sent), sent))


def test_with_all_coefficients_everything_arrives() -> None:
    values = normals(NUMEL)
    torch.testing.assert_close(DCT(k=4096).fit(MODEL).round_trip(values), values, rtol=0, atol=5e-6)


def test_what_is_sent_and_what_is_left_make_up_the_norm() -> None:
    values = normals(NUMEL)
    sent = DCT(k=9).fit(MODEL).round_trip(values).double()
    left = values.double() - sent
    assert math.isclose(float(sent.square().sum() + left.square().sum()), values.double().norm() ** 2, rel_tol=1e-5)
    assert left.norm() < values.norm()


def test_a_pure_wave_is_one_coefficient() -> None:
    wave = torch.from_numpy(np.outer(cosines(64)[5], cosines(48)[17])).float()
    codec = DCT(k=1).fit([(64, 48)])
    torch.testing.assert_close(codec.round_trip(wave), wave, rtol=0, atol=1e-6)
    assert codec.wire_bytes(64 * 48) == 4 + 2


def test_the_wire_takes_what_the_reference_sends_with_indices_of_twelve_bits() -> None:
    codec = DCT().fit([(4096, 4096)])
    assert codec.wire_bytes(4096 * 4096) == 4096 * 32 * 5.5
    assert DCT().wire_bytes(6400) == 100 * (32 * 4 + 8)  # half of a vector, and a bitmap
    assert DCT(values="sign_magnitude").fit([(4096, 4096)]).wire_bytes(4096 * 4096) < 4096 * (56 + 1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_decoding_is_exact_integer_arithmetic(scale: float) -> None:
    """So it is the same on every processor. An oracle in Python's integers: two products, rounded in between."""
    height, width = 8, 64
    sent = (normals(height * width) * scale).view(height, width)
    sent[:, :] = torch.where(normals(height * width, 1).view(height, width) > 0, sent, sent[0, 0])
    exponent = math.frexp(float(sent.abs().max()))[1]
    fixed = [[round(float(x) * 2.0 ** (23 - exponent)) for x in row] for row in sent.double()]
    left, right = ([[round(x * 2**24) for x in row] for row in cosines(size).tolist()] for size in (height, width))
    half = [[sum(row[u] * right[u][j] for u in range(width)) for j in range(width)] for row in fixed]
    half = [[round(x / 2**24) for x in row] for row in half]
    whole = [[sum(left[u][i] * half[u][j] for u in range(height)) for j in range(width)] for i in range(height)]
    expected = torch.tensor([[x * 2.0 ** (exponent - 47) for x in row] for row in whole], dtype=torch.float64)
    codec = DCT(k=height * width).fit([(height, width)])
    packet = Packet("dct_topk", height * width, 4 * height * width, sent.reshape(-1).view(torch.uint8))
    assert torch.equal(codec.decode(packet, sent), expected.float())


def test_the_largest_sums_are_exact_too() -> None:
    """Coefficients whose signs all agree with one column: partial sums are as long as they can get."""
    signs = torch.from_numpy(np.outer(np.sign(cosines(64)[:, 1]), np.sign(cosines(64)[:, 62]))).float()
    sent = signs * (2 - 2**-22)
    codec = DCT(k=4096).fit([(64, 64)])
    packet = Packet("dct_topk", 4096, 4 * 4096, sent.reshape(-1).view(torch.uint8))
    left = (torch.from_numpy(cosines(64)) * 2**24).round().long()
    fixed = (sent.double() * 2**22).round().long()
    half = (torch.matmul(fixed, left).double() / 2**24).round().long()
    whole = torch.matmul(left.T, half)  # int64: exact as long as it fits
    assert int(whole.abs().max()) > 2**51
    assert torch.equal(codec.decode(packet, sent), (whole.double() * 2.0**-46).float())


def test_fitting_makes_a_copy_that_is_told_apart_and_refuses_other_lengths() -> None:
    codec = DCT()
    fitted = codec.fit([(64, 64)])
    assert (fitted == DCT().fit([(64, 64)]), fitted == codec, codec == DCT()) == (True, False, True)
    assert fitted.to_table() == codec.to_table()
    assert codec.shaped
    with pytest.raises(ValueError, match="a vector of 4095 elements is not made of tensors of shapes"):
        fitted.wire_bytes(4095)
    wrapped = ErrorFeedback(codec=codec).fit([(64, 64)])
    assert torch.equal(wrapped.round_trip(normals(4096)), fitted.round_trip(normals(4096)))
    assert wrapped.shaped


def test_with_feedback_every_frequency_arrives_in_time() -> None:
    codec = ErrorFeedback(codec=DCT(k=8)).fit([(64, 64)])
    (coder,), (slots,) = coders_of(codec, 1)
    values, received = normals(4096), torch.zeros(4096)
    for _ in range(50):
        received += codec.decode(coder.encode(values), values)
        coder.commit()
    torch.testing.assert_close(received + slots["residual"], 50 * values, rtol=0, atol=1e-3)


def test_hostile_packets_are_refused_or_decode_to_finite_values() -> None:
    generator = torch.Generator().manual_seed(0)
    codec = DCT(k=3).fit([(4, 6), (5,)])
    packet = codec.encode(normals(29))
    whole = payload_of(packet).clone()
    codes = set()
    for place in range(len(whole)):
        for _ in range(8):
            payload_of(packet).copy_(whole)[place] = torch.randint(0, 256, (), dtype=torch.uint8, generator=generator)
            try:
                assert bool(torch.isfinite(codec.decode(packet, torch.empty(29))).all())
                codes.add("none")
            except FrameError as refused:
                codes.add(refused.code)
    assert codes == {"index", "codec", "none"}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(poison: float) -> None:
    values = normals(NUMEL)
    values[NUMEL // 2] = poison
    with pytest.raises(FrameError):
        DCT().fit(MODEL).round_trip(values)


def test_a_phantom_has_the_size_of_the_real_packet() -> None:
    codec = DCT().fit(MODEL)
    phantom: Tensor = Phantom(NUMEL)  # type: ignore[assignment]
    assert codec.encode(phantom).nbytes == len(payload_of(codec.encode(normals(NUMEL))))
