"""EF21: mirrors of what each worker has."""

from __future__ import annotations

import random

import pytest
import torch
from board import Slots, all_same, coders_of, means, normals
from pydantic import ValidationError
from torch import Tensor

from decentral.errors import PeerGone
from decentral.phantom import Phantom
from decentral.protocols.codecs import EF21, Codec, Coder, Int8, TopK

WHOLE = EF21(codec=TopK(k=10, chunk=10, values="float32"))
"""C(x) = x."""
ONE = TopK(k=1, chunk=10, values="float32")


def commit(coders: list[Coder]) -> None:
    for coder in coders:
        coder.commit()


def vectors_of(workers: int, seed: int, size: int = 100) -> list[Tensor]:
    return list(normals(workers * size, seed).view(workers, size))


def test_with_a_lossless_codec_it_is_the_plain_mean_and_so_gradient_descent() -> None:
    coders, _ = coders_of(WHOLE, 3)
    for round_ in range(5):
        vectors = vectors_of(3, round_)
        got, _ = means(coders, vectors)
        commit(coders)
        torch.testing.assert_close(got[0], torch.stack(vectors).mean(dim=0), rtol=0, atol=1e-6)


def test_by_hand() -> None:
    """One worker, top-1 of 2, the same vector: one element after the other arrives."""
    coder = EF21(codec=TopK(k=1, chunk=2, values="float32")).coder(Slots())
    vector = torch.tensor([3.0, -2.0])
    for expected in ([3, 0], [3, -2], [3, -2]):
        assert means([coder], [vector])[0][0].tolist() == expected
        coder.commit()


@pytest.mark.parametrize("codec", [ONE, TopK(k=3, chunk=20), Int8()], ids=["top-1", "top-3 of two bits", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_is_always_that_of_the_mirrors(codec: Codec, seed: int) -> None:
    """Whatever fails, is tried again, is aborted or undone in between."""
    chance = random.Random(seed)
    coders, slots = coders_of(EF21(codec=codec), 4)
    for round_ in range(12):
        vectors = vectors_of(4, seed * 100 + round_)
        if chance.random() < 0.3:
            with pytest.raises(PeerGone):
                means(coders, vectors, fails_at=0)
        before = [{name: value.clone() for name, value in each.items()} for each in slots]
        got, _ = means(coders, vectors)
        again, _ = means(coders, vectors)
        assert all_same([*got, *again])
        outcome = chance.choice(["commit", "commit", "abort", "undo"])
        for coder in coders:
            getattr(coder, outcome)()
        if outcome == "commit":
            mirrors = torch.stack([each["mirror"] for each in slots])
            torch.testing.assert_close(got[0], mirrors.mean(dim=0), rtol=0, atol=1e-5)
            assert all(torch.equal(each["mirrors"], got[0]) for each in slots)
        else:
            for each, old in zip(slots, before, strict=True):
                assert all(torch.equal(each[name], old[name]) for name in old)


def test_vectors_that_stay_are_known_exactly_in_time() -> None:
    """Each round the error of top-1 of 10 shrinks by (1 - 1/10) at least."""
    coders, _ = coders_of(EF21(codec=ONE), 3)
    vectors = vectors_of(3, 1)
    mean = torch.stack(vectors).mean(dim=0)
    for round_ in range(10):
        got, _ = means(coders, vectors)
        commit(coders)
        bound = sum(float(each.norm()) for each in vectors) / 3 * 0.9 ** ((round_ + 1) / 2)
        assert (got[0] - mean).norm() <= bound + 1e-6
    torch.testing.assert_close(got[0], mean, rtol=0, atol=1e-6)


def test_gradient_descent_converges_on_quadratics_of_which_one_is_steep() -> None:
    """n = 20, one L = 100 and 19 of 1, top-1 of 4; step 1 / (L + L' xi), L' the arithmetic mean (2402.10774)."""
    workers, size = 20, 4
    steep = torch.ones(workers)
    steep[0] = 100.0
    optima = normals(workers * size, 3).view(workers, size)
    best = (steep[:, None] * optima).sum(dim=0) / steep.sum()
    contraction = 1 / size
    xi = (1 + (1 - contraction) ** 0.5) / contraction - 1
    average = float(steep.mean())
    step = 1 / (average + average * xi)
    coders, _ = coders_of(EF21(codec=TopK(k=1, chunk=size, values="float32")), workers)
    point = torch.zeros(size)
    for _ in range(70):
        gradients = list(steep[:, None] * (point - optima))
        got, _ = means(coders, gradients)
        commit(coders)
        point = point - step * got[0]
    assert (point - best).norm() < 1e-3 * best.norm()


def test_when_others_take_part_all_begin_again() -> None:
    codec = EF21(codec=ONE)
    coders, slots = coders_of(codec, 3)
    for round_ in range(3):
        means(coders, vectors_of(3, round_), ids=(0, 4, 5))
        commit(coders)
    survivors, vectors = coders[:2], vectors_of(2, 7)
    got, _ = means(survivors, vectors, ids=(0, 4))
    fresh, _ = means(coders_of(codec, 2)[0], vectors, ids=(0, 4))
    assert all_same([*got, *fresh])
    for coder in survivors:
        coder.undo()  # not committed: the mirrors of the three still stand
    got, _ = means(coders, vectors_of(3, 3), ids=(0, 4, 5))
    commit(coders)
    mirrors = torch.stack([each["mirror"] for each in slots])
    torch.testing.assert_close(got[0], mirrors.mean(dim=0), rtol=0, atol=1e-6)
    assert torch.stack(list(mirrors)).count_nonzero() > 3 * 10  # of more rounds than one
    newcomer = codec.coder(Slots())
    got, _ = means([*coders[:2], newcomer], vectors_of(3, 9), ids=(0, 4, 6))
    fresh, _ = means(coders_of(codec, 3)[0], vectors_of(3, 9), ids=(0, 4, 6))
    assert all_same([*got, *fresh])


def test_memory_is_restored_from_the_slots_alone() -> None:
    codec = EF21(codec=ONE)
    coders, slots = coders_of(codec, 2)
    means(coders, vectors_of(2, 1))
    commit(coders)
    restored = [codec.coder(Slots({name: value.clone() for name, value in each.items()})) for each in slots]
    assert all_same([*means(coders, vectors_of(2, 2))[0], *means(restored, vectors_of(2, 2))[0]])


def test_a_worker_whose_vector_is_not_finite_remembers_nothing_of_it() -> None:
    slots = Slots()
    coder = WHOLE.coder(slots)
    means([coder], [torch.ones(10)])
    coder.commit()
    with pytest.raises(ValueError, match="NaN or infinity"):
        means([coder], [torch.full((10,), torch.nan)])
    coder.commit()
    assert slots["mirror"].tolist() == [1.0] * 10


def test_phantoms_send_as_much() -> None:
    phantoms: list[Tensor] = [Phantom(5000)] * 2  # type: ignore[list-item]
    coders, _ = coders_of(EF21(codec="topk"), 2)
    got, packets = means(coders, phantoms)
    commit(coders)
    assert [len(each) for each in got] == [5000] * 2
    assert packets[0][1].nbytes == TopK().wire_bytes(5000)


@pytest.mark.parametrize(
    ("codec", "why"),
    [
        ("float32", "'float32' is lossless"),
        ("sketch", "'sketch' is unbiased"),
        ("powersgd", "memory of its own"),
        ({"name": "error_feedback", "codec": "topk"}, "memory of its own"),
        ({"name": "ef21", "codec": "topk"}, "memory of its own"),
    ],
)
def test_what_does_not_bring_a_vector_nearer_is_refused(codec: object, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        EF21(codec=codec)
    assert EF21.same_participants
