"""Error feedback: nothing that was handed in is lost."""

from __future__ import annotations

import random

import pytest
import torch
from board import Slots, all_same, coders_of, means, normals
from pydantic import ValidationError
from torch import Tensor

from decentral.errors import PeerGone
from decentral.phantom import Phantom
from decentral.protocols.codecs import Codec, ErrorFeedback, Int8, SignMagnitude, TopK
from decentral.wire import FrameError

TOP = TopK(k=5, chunk=50, values="float32")
CODECS = [TOP, TopK(k=5, chunk=50), Int8(), SignMagnitude()]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=["topk", "topk of two bits", "int8", "two bits"])


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@every_codec
@pytest.mark.parametrize("seed", range(3))
def test_used_and_remembered_and_handed_back_are_what_was_handed_in(codec: Codec, seed: int) -> None:
    """Any sequence of rounds, each tried once or more, then committed, aborted, or undone."""
    chance = random.Random(seed)
    coders, slots = coders_of(ErrorFeedback(codec=codec), 3)
    handed_in, used = torch.zeros(3, 120), torch.zeros(120)
    for round_ in range(15):
        vectors = list(normals(360, seed * 100 + round_).view(3, 120))
        if chance.random() < 0.3:
            with pytest.raises(PeerGone):
                means(coders, vectors, fails_at=0)
        outcome = chance.choice(["commit", "abort", "undo"])
        got, _ = means(coders, vectors)
        assert all_same(got)
        for coder in coders:
            getattr(coder, outcome)()
        if outcome != "undo":
            handed_in += torch.stack(vectors)
        if outcome == "commit":
            used += got[0]
        remembered = torch.stack([each["residual"] for each in slots])
        close(used + remembered.mean(dim=0), handed_in.mean(dim=0))


@every_codec
def test_what_one_worker_sent_and_remembers_telescopes(codec: Codec) -> None:
    feedback, slots = ErrorFeedback(codec=codec), Slots()
    coder = feedback.coder(slots)
    sent, handed_in = torch.zeros(500), torch.zeros(500)
    for round_ in range(20):
        vector = normals(500, round_)
        handed_in += vector
        sent += codec.decode(coder.encode(vector), vector)
        coder.commit()
        close(sent + slots["residual"], handed_in)


@every_codec
def test_a_second_attempt_is_the_first_once_more(codec: Codec) -> None:
    coders, slots = coders_of(ErrorFeedback(codec=codec), 2)
    vectors = [normals(120, seed) for seed in range(2)]
    means(coders, vectors)
    for coder in coders:
        coder.commit()
    before = [each["residual"].clone() for each in slots]
    first, _ = means(coders, vectors)
    second, _ = means(coders, vectors)
    assert all_same([*first, *second])
    assert all(torch.equal(each["residual"], old) for each, old in zip(slots, before, strict=True))
    for coder in coders:
        coder.undo()
    assert all(torch.equal(each["residual"], old) for each, old in zip(slots, before, strict=True))


def test_the_residual_decays() -> None:
    """e <- beta e + x - C(beta e + x), by hand: k = 1 of 2."""
    slots = Slots()
    coder = ErrorFeedback(codec=TopK(k=1, chunk=2, values="float32"), decay=0.5).coder(slots)
    expected = [(torch.tensor([3.0, 0]), [0, 2]), (torch.tensor([3.0, 0]), [0, 1]), (torch.tensor([3.0, 0]), [0, 0.5])]
    for round_, (sent, residual) in enumerate(expected):
        vector = torch.tensor([3.0, 2.0 if round_ == 0 else 0.0])
        assert torch.equal(TopK(k=1, chunk=2, values="float32").decode(coder.encode(vector), vector), sent)
        coder.commit()
        assert slots["residual"].tolist() == residual


def test_a_small_constant_is_sent_in_time_and_nothing_of_it_is_lost() -> None:
    """One element of 50 is fed .1 a round beside others of 1: with 5 of 50 a round it waits, and comes whole."""
    slots = Slots()
    coder = ErrorFeedback(codec=TOP).coder(slots)
    sent = torch.zeros(50)
    vector = torch.ones(50)
    vector[17] = 0.1
    for _ in range(300):
        sent += TOP.decode(coder.encode(vector), vector)
        coder.commit()
    assert sent[17] > 0
    assert float(sent[17] + slots["residual"][17]) == pytest.approx(30, abs=1e-3)


@pytest.mark.parametrize("cuts", [1, 3])
def test_what_is_remembered_is_what_others_lack_even_if_the_vector_went_in_parts(cuts: int) -> None:
    slots = Slots()
    coder = ErrorFeedback(codec=TopK(k=5, chunk=50)).coder(slots)
    codec = ErrorFeedback(codec=TopK(k=5, chunk=50)).codec
    vector = normals(2 * codec.grain + 30)
    coder.encode(vector)
    heard = torch.cat([codec.round_trip(part) for part in torch.split(vector, cuts * codec.grain)])
    coder.commit()
    close(heard + slots["residual"], vector)


def test_what_is_not_finite_is_not_remembered() -> None:
    slots = Slots()
    coder = ErrorFeedback(codec=TOP).coder(slots)
    poisoned = normals(100)
    poisoned[3] = torch.nan
    for ending in (coder.abort, coder.commit):
        with pytest.raises(FrameError):
            TOP.decode(coder.encode(poisoned), poisoned)
        ending()
        assert slots["residual"].count_nonzero() == 0


def test_phantoms_of_any_length_keep_their_length_whatever_the_slots_are() -> None:
    coder = ErrorFeedback(codec="topk").coder(lambda name, like: Phantom(10**9))  # type: ignore[arg-type, return-value]
    phantom: Tensor = Phantom(5000)  # type: ignore[assignment]
    (got,), packets = means([coder], [phantom])
    assert (len(got), packets[0][0].nbytes) == (5000, TopK().wire_bytes(5000))
    coder.commit()
    assert coder.encode(phantom).numel == 5000
    coder.abort()


@pytest.mark.parametrize(
    ("codec", "why"),
    [
        ("float32", "leaves nothing out"),
        ("sketch", "unbiased"),
        ("powersgd", "remembers by itself"),
        ({"name": "error_feedback", "codec": "int8"}, "remembers by itself"),
        ({"name": "ef21", "codec": "topk"}, "remembers by itself"),
    ],
)
def test_feedback_where_there_is_nothing_to_feed_back_is_refused(codec: object, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ErrorFeedback(codec=codec)


@pytest.mark.parametrize("codec", ["bf16", "int8", "topk", "sign_magnitude", "dct_topk"])
def test_feedback_composes_by_name(codec: str) -> None:
    feedback = ErrorFeedback(codec=codec)
    assert feedback.to_table()["codec"]["name"] == codec
    assert feedback.wire_bytes(10_000) == feedback.codec.wire_bytes(10_000)
    assert feedback.grain == feedback.codec.grain
