"""PowerSGD: the checks of the paper, and that nothing is lost."""

from __future__ import annotations

import math
import random

import pytest
import torch
from board import Slots, all_same, coders_of, means, normals, payload_of
from torch import Tensor

from decentral.errors import PeerGone
from decentral.phantom import Phantom
from decentral.protocols.codecs import ErrorFeedback, PowerSGD
from decentral.protocols.codecs.powersgd import orthonormalise
from decentral.wire import FrameError

SHAPE = (24, 20)
ONE = PowerSGD(rank=2).fit([SHAPE])
MODEL = [(24, 20), (7,), (), (16, 2, 3, 3), (3, 3), (0, 4), (30, 10)]
MODEL_NUMEL = 24 * 20 + 7 + 1 + 16 * 18 + 9 + 300
SMALL = [7 + 1 + 9]


def low_rank(rank: int, seed: int = 0, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Return a matrix of that rank, flattened."""
    left, right = normals(shape[0] * rank, seed).view(-1, rank), normals(shape[1] * rank, seed + 50).view(rank, -1)
    return (left @ right).reshape(-1)


def best(matrix: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of that rank (Eckart and Young)."""
    u, s, v = torch.linalg.svd(matrix.view(SHAPE).double(), full_matrices=False)
    nearest: Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
    return nearest.float().reshape(-1)


# -- the four checks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_a_matrix_of_low_rank_arrives_whole_and_leaves_nothing(rank: int) -> None:
    slots = Slots()
    coder = ONE.coder(slots)
    matrix = low_rank(rank)
    (got,), _ = means([coder], [matrix])
    coder.commit()
    torch.testing.assert_close(got, matrix, rtol=0, atol=1e-5)
    assert slots["residual"].norm() < 1e-5 * matrix.norm()


@pytest.mark.parametrize("to_one_receiver", [False, True])
def test_the_same_matrix_again_and_again_comes_to_the_best_of_its_rank(to_one_receiver: bool) -> None:
    slots = Slots()
    coder = ONE.coder(slots)
    matrix = low_rank(2) + 0.3 * normals(480, 9)
    for _ in range(40):
        slots["residual"] = torch.zeros(480)
        got = ONE.decode(coder.encode(matrix), matrix) if to_one_receiver else means([coder], [matrix])[0][0]
        coder.commit()
    torch.testing.assert_close(got, best(matrix, 2), rtol=0, atol=1e-3)


def test_many_workers_come_to_what_one_with_their_mean_does() -> None:
    coders, _ = coders_of(ONE, 5)
    (alone,), _ = coders_of(ONE, 1)
    for round_ in range(4):
        vectors = list(normals(5 * 480, round_).view(5, 480))
        together, _ = means(coders, vectors)
        (single,), _ = means([alone], [torch.stack(vectors).mean(dim=0)])
        assert all_same(together)
        torch.testing.assert_close(together[0], single, rtol=0, atol=1e-4)
        for coder in (*coders, alone):
            coder.commit()


def test_what_is_left_has_nothing_of_what_was_sent() -> None:
    coders, slots = coders_of(ONE, 3)
    for round_ in range(3):
        got, _ = means(coders, list(normals(3 * 480, round_).view(3, 480)))
        for coder in coders:
            coder.commit()
        basis = torch.linalg.svd(got[0].view(SHAPE))[0][:, :2]  # spans what P does
        for each in slots:
            residual = each["residual"].view(SHAPE)
            assert (basis.T @ residual).norm() < 1e-5 * residual.norm()


def test_residuals_of_unequal_workers_stay_bounded() -> None:
    """With the averaged Q in the residual they would grow by ||M_i - mean M|| a round, for ever."""
    rounds = 100
    coders, slots = coders_of(PowerSGD(min_compression=1).fit([(12, 10)]), 3)
    own = normals(3 * 120, 1).view(3, 120)
    for round_ in range(rounds):
        means(coders, list(own + 2 * normals(3 * 120, 100 + round_).view(3, 120)))
        for coder in coders:
            coder.commit()
    drift = (own - own.mean(dim=0)).norm(dim=1)
    residuals = torch.stack([each["residual"] for each in slots]).norm(dim=1)
    assert (residuals < 0.15 * rounds * drift).all()


# -- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_used_and_remembered_and_handed_back_are_what_was_handed_in(seed: int) -> None:
    """Any sequence of rounds, cut off in either phase or tried again, then committed, aborted or undone."""
    chance = random.Random(seed)
    coders, slots = coders_of(PowerSGD().fit(MODEL), 3)
    handed_in, used = torch.zeros(MODEL_NUMEL), torch.zeros(MODEL_NUMEL)
    for round_ in range(15):
        vectors = list(normals(3 * MODEL_NUMEL, seed * 100 + round_).view(3, -1))
        before = [{name: value.clone() for name, value in each.items()} for each in slots]
        fails_at = chance.choice([None, None, 0, 1])
        outcome = chance.choice(["commit", "abort", "undo"])
        if fails_at is None:
            got, _ = means(coders, vectors)
            again, _ = means(coders, vectors)
            assert all_same([*got, *again])
        else:
            outcome = "abort" if outcome == "commit" else outcome
            with pytest.raises(PeerGone):
                means(coders, vectors, fails_at=fails_at)
        for coder in coders:
            getattr(coder, outcome)()
        if outcome != "undo":
            handed_in += torch.stack(vectors).mean(dim=0)
        if outcome == "commit":
            used += got[0]
            assert all_same([each["q"] for each in slots])
        else:
            assert all(torch.equal(each["q"], old["q"]) for each, old in zip(slots, before, strict=True) if old)
        remembered = torch.stack([each["residual"] for each in slots]).mean(dim=0)
        torch.testing.assert_close(used + remembered, handed_in, rtol=0, atol=1e-4)


def test_to_one_receiver_what_arrives_and_what_is_remembered_are_what_was_handed_in() -> None:
    codec, slots = PowerSGD().fit(MODEL), Slots()
    coder = codec.coder(slots)
    sent, handed_in = torch.zeros(MODEL_NUMEL), torch.zeros(MODEL_NUMEL)
    for round_ in range(10):
        vector = normals(MODEL_NUMEL, round_)
        packet = coder.encode(vector)
        assert (packet.nbytes, packet.numel) == (codec.wire_bytes(MODEL_NUMEL), MODEL_NUMEL)
        if round_ % 3 == 2:
            coder.abort()
        else:
            sent += codec.decode(packet, vector)
            coder.commit()
        handed_in += vector
        torch.testing.assert_close(sent + slots["residual"], handed_in, rtol=0, atol=1e-4)
    assert "q" not in slots  # which is the same at every worker, and stays so


def test_what_is_not_finite_is_refused_and_not_remembered() -> None:
    slots = Slots()
    coder = ONE.coder(slots)
    poisoned = normals(480)
    poisoned[100] = math.nan
    for ending in (coder.commit, coder.abort):
        with pytest.raises(FrameError, match="NaN or infinity"):
            means([coder], [poisoned])
        ending()
        with pytest.raises(FrameError, match="NaN or infinity"):
            ONE.decode(coder.encode(poisoned), poisoned)
        ending()
        assert all(bool(torch.isfinite(value).all()) for value in slots.values())
        assert slots["residual"].count_nonzero() == 0


# -- corner cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-18, 1e-8, 1e15])
def test_after_zeros_and_at_any_scale_it_goes_on_as_at_first(scale: float) -> None:
    coders, _ = coders_of(ONE, 2)
    for _ in range(2):
        got, _ = means(coders, [torch.zeros(480)] * 2)
        assert got[0].count_nonzero() == 0
        for coder in coders:
            coder.commit()
    for _ in range(3):  # Q would have the size of the matrix, and the next product that of its square
        got, _ = means(coders, [scale * low_rank(2)] * 2)
        torch.testing.assert_close(got[0] / scale, low_rank(2), rtol=0, atol=1e-4)
        for coder in coders:
            coder.commit()
    got, _ = means(coders, [scale * low_rank(1)] * 2)  # one column of Q has nothing to do
    for coder in coders:
        coder.commit()
    got, _ = means(coders, [scale * low_rank(2, seed=4)] * 2)
    torch.testing.assert_close(got[0] / scale, low_rank(2, seed=4), rtol=0, atol=1e-3)


def test_what_would_not_shrink_travels_as_it_is_and_bytes_are_those_of_the_factors() -> None:
    codec = PowerSGD().fit(MODEL)
    factors = [(24, 20), (16, 18), (30, 10)]
    assert codec.wire_bytes(MODEL_NUMEL) == 4 * (sum(2 * (m + n) for m, n in factors) + sum(SMALL))
    values = normals(MODEL_NUMEL)
    decoded = codec.round_trip(values)
    assert torch.equal(decoded[480:488], values[480:488])
    assert torch.equal(decoded[776:785], values[776:785])
    assert not torch.equal(decoded, values)
    assert PowerSGD(min_compression=1).fit([(8, 8)]).wire_bytes(64) == 4 * 32
    assert PowerSGD(min_compression=2.1).fit([(8, 8)]).wire_bytes(64) == 4 * 64
    assert PowerSGD().wire_bytes(1000) == 4000  # of which nobody has said that it has rows
    assert torch.equal(PowerSGD().round_trip(values), values)


def test_the_rank_is_at_most_that_of_the_matrix() -> None:
    codec = PowerSGD(rank=50, min_compression=1).fit([(2, 1000)])
    values = normals(2000)
    assert codec.wire_bytes(2000) == 8000
    thin = PowerSGD(rank=3, min_compression=1).fit([(2, 1000)])
    assert thin.wire_bytes(2000) == 8000
    torch.testing.assert_close(thin.round_trip(values), values)


def test_vectors_without_matrices_take_one_phase() -> None:
    coders, slots = coders_of(PowerSGD().fit([(5,), (3, 3)]), 2)
    got, packets = means(coders, [normals(14, 0), normals(14, 1)])
    torch.testing.assert_close(got[0], (normals(14, 0) + normals(14, 1)) / 2)
    for coder in coders:
        coder.commit()
    assert len(packets) == 1
    assert slots[0]["residual"].count_nonzero() == 0


def test_phantoms_send_as_much_in_as_many_phases() -> None:
    codec = PowerSGD().fit(MODEL)
    phantoms: list[Tensor] = [Phantom(MODEL_NUMEL)] * 2  # type: ignore[list-item]
    coders, _ = coders_of(codec, 2)
    real, _ = coders_of(codec, 2)
    got, packets = means(coders, phantoms)
    assert [len(each) for each in got] == [MODEL_NUMEL] * 2
    _, expected = means(real, [normals(MODEL_NUMEL)] * 2)
    assert [packet[0].nbytes for packet in packets] == [packet[0].nbytes for packet in expected]
    assert coders[0].encode(phantoms[0]).nbytes == codec.wire_bytes(MODEL_NUMEL)
    for coder in coders:
        coder.commit()
        coder.encode(phantoms[0])
        coder.abort()
    assert ErrorFeedback(codec="int8").fit(MODEL).wire_bytes(10) == 10 + 4


def test_other_lengths_than_it_was_fit_to_are_refused() -> None:
    with pytest.raises(ValueError, match="a vector of 479 elements is not made of tensors of shapes"):
        ONE.encode(normals(479))
    assert (ONE.grain, ONE.shaped, ONE.linear, ONE.phases) == (0, True, True, 2)
    assert payload_of(ONE.encode(normals(480))).numel() == ONE.wire_bytes(480) == 4 * 2 * 44


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e38])
def test_bases_are_orthonormal_even_of_columns_that_are_nearly_parallel(size: int, scale: float) -> None:
    rank = min(size, 4)
    columns = normals(size * rank).view(size, rank).clamp(-3, 3)
    columns[:, -1] = columns[:, 0] + 1e-3 * columns[:, -1]
    basis = orthonormalise(columns * scale).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
    span = basis @ basis.T @ columns.double()
    torch.testing.assert_close(span, columns.double(), rtol=0, atol=1e-4)


def test_a_column_that_depends_on_others_has_no_place_in_the_basis() -> None:
    columns = normals(300).view(100, 3)
    columns[:, 1] = -3 * columns[:, 0]
    basis = orthonormalise(torch.cat([columns, torch.zeros(100, 1)], dim=1))
    assert basis[:, [1, 3]].count_nonzero() == 0
    torch.testing.assert_close(basis[:, [0, 2]].T @ basis[:, [0, 2]], torch.eye(2), rtol=0, atol=1e-6)
