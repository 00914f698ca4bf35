"""Random projections that can be summed."""

from __future__ import annotations

import math

import pytest
import torch
from board import all_same, coders_of, means, normals, payload_of
from torch import Tensor

from decentral.phantom import Phantom
from decentral.protocols.codecs import ErrorFeedback, Sketch, TopK
from decentral.wire import FrameError, Packet

SIZES = [1, 2, 3, 64, 100, 65_536, 65_537, 150_000]


@pytest.mark.parametrize("ratio", [2.0, 8.0])
@pytest.mark.parametrize("size", [32, 100])
def test_it_is_unbiased_with_the_second_moment_of_the_closed_form(size: int, ratio: float) -> None:
    """E C(x) = x, E ||C(x)||^2 = d/b ||x||^2, d the padded length: within three standard errors over the seeds."""
    values = normals(size)
    codec = Sketch(ratio=ratio)
    padded = 1 << (size - 1).bit_length()
    drawn = torch.stack([codec.lift(codec.project(values, seed), size, seed) for seed in range(400)]).double()
    errors = drawn.mean(dim=0) - values
    deviations = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert float((errors / deviations).square().mean()) < 1 + 3 * math.sqrt(2 / size)
    squares = (drawn - values).square().sum(dim=1)
    # What falls on the padding is cut off: (d - n) / (d - 1) of the error, as it is spread evenly.
    expected = (padded / codec.rows(size) - 1) * float(values.square().sum()) * (size - 1) / (padded - 1)
    assert abs(float(squares.mean()) - expected) < 3 * float(squares.std()) / math.sqrt(len(drawn)) + 1e-5 * expected


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_sketches_are_sketches_of_sums_bit_for_bit(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(-50, 51, (size,), generator=generator).float() for _ in range(2))
    codec = Sketch()
    assert torch.equal(codec.project(first, 7) + codec.project(second, 7), codec.project(first + second, 7))


@pytest.mark.parametrize("size", SIZES)
def test_with_as_many_rows_as_elements_everything_arrives(size: int) -> None:
    values = normals(size)
    torch.testing.assert_close(Sketch(ratio=1).round_trip(values), values, rtol=0, atol=1e-5)


def test_the_mixing_is_the_walsh_hadamard_matrix_by_random_signs() -> None:
    mixing = torch.stack([Sketch(ratio=1).project(unit, 3) for unit in torch.eye(16)], dim=1)
    hadamard = torch.ones(1, 1)
    for _ in range(4):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    assert torch.equal(mixing, hadamard * mixing[0])  # row 0 of H is all ones, and shows the signs
    assert set(mixing[0].tolist()) == {-1, 1}
    chosen = torch.stack([Sketch(ratio=4).project(unit, 3) for unit in torch.eye(16)], dim=1)
    assert len({tuple(row) for row in (chosen * chosen[0]).tolist()}) == 4  # without replacement


@pytest.mark.parametrize("size", SIZES)
def test_lifting_is_the_transpose_of_projecting(size: int) -> None:
    codec = Sketch(ratio=4)
    values, sketch = normals(size), normals(codec.rows(size), seed=1)
    if size <= 65_536:  # blocks of several lengths have each their own divisor
        rows = codec.rows(size)
        expected = float(codec.project(values, 5).double() @ sketch.double()) / rows
        lifted = float(values.double() @ codec.lift(sketch, size, 5).double())
        assert math.isclose(lifted, expected, rel_tol=1e-4, abs_tol=1e-4)
    assert codec.lift(sketch, size, 5).shape == (size,)


def test_blocks_have_signs_of_their_own() -> None:
    values = torch.ones(2 * 65_536)
    sketch = Sketch(ratio=8).project(values, 0).view(2, -1)
    assert not torch.equal(sketch[0], sketch[1])


def test_the_mean_takes_the_rounds_directions_and_is_the_same_for_all() -> None:
    vectors = [normals(1000, seed) for seed in range(4)]
    coders, slots = coders_of(Sketch(), 4)
    first, packets = means(coders, vectors, seed=11)
    assert all_same(first)
    mean = torch.stack(vectors).mean(dim=0)
    codec = Sketch()
    torch.testing.assert_close(first[0], codec.lift(codec.project(mean, 11), 1000, 11), rtol=0, atol=1e-4)
    assert [packet.nbytes for packet in packets[0].values()] == [4 * 128] * 4
    again, _ = means(coders, vectors, seed=11)
    other, _ = means(coders, vectors, seed=12)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    for coder in coders:
        coder.commit()
    assert slots == [{}] * 4  # it remembers nothing


def test_to_one_receiver_the_seed_goes_along() -> None:
    values = normals(1000)
    packet = Sketch().encode(values)
    assert packet.nbytes == Sketch().wire_bytes(1000) == 4 * 128 + 8
    seed = int.from_bytes(bytes(payload_of(packet)[-8:].tolist()), "little")
    assert torch.equal(Sketch().decode(packet, values), Sketch().lift(Sketch().project(values, seed), 1000, seed))
    other = payload_of(Sketch().encode(values + 1))[-8:]
    assert not torch.equal(other, payload_of(packet)[-8:])


def test_any_seed_and_any_finite_sketch_can_be_decoded() -> None:
    for byte in (0, 127, 128, 255):
        payload = torch.full((4 * 16 + 8,), byte, dtype=torch.uint8)
        payload[:64] = 0
        assert Sketch().decode(Packet("sketch", 100, 72, payload), torch.empty(100)).count_nonzero() == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(poison: float) -> None:
    values = normals(1000)
    values[999] = poison
    with pytest.raises(FrameError, match="NaN or infinity"):
        Sketch().round_trip(values)


def test_phantoms_send_as_much() -> None:
    phantoms: list[Tensor] = [Phantom(150_000)] * 2  # type: ignore[list-item]
    coders, _ = coders_of(Sketch(), 2)
    got, packets = means(coders, phantoms)
    assert [len(each) for each in got] == [150_000] * 2
    assert packets[0][0].nbytes == 4 * Sketch().rows(150_000)


@pytest.mark.parametrize("wrapped", [ErrorFeedback, TopK])
def test_what_makes_its_errors_grow_is_refused(wrapped: type) -> None:
    with pytest.raises(ValueError, match="sketch"):
        wrapped(codec="sketch") if wrapped is ErrorFeedback else wrapped(values="sketch")
