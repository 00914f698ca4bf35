"""The lease book: every sample is free, held by one worker that is there, or settled; and what a journal proves."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decentral.coverage import Coverage, Repeat, coverage
from decentral.errors import VerificationError
from decentral.journal import Joined, Leased, Left, Lost, Record, Settled, Trained
from decentral.leases import Grant, LeaseBook, Range, Ranges, Request, merged
from decentral.members import Roster

WORKERS = 4
BATCH = 4


def each(ranges: Any) -> list[int]:
    return [index for start, stop in ranges for index in range(start, stop)]


# Ranges.


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9))), st.integers(0, 200), st.integers(0, 200))
def test_ranges_are_used_in_the_order_in_which_they_came(pairs: list[tuple[int, int]], first: int, then: int) -> None:
    given_ = [Range(start, start + length) for start, length in pairs]
    ranges, expected = Ranges(given_), each(given_)
    assert len(ranges) == len(expected)
    assert each(ranges.first(first)) == expected[:first]
    assert each(ranges.take(first)) == expected[:first]
    assert each(ranges.take(then)) == expected[first : first + then]
    assert each(ranges) == expected[first + then :]
    assert len(ranges) == len(expected[first + then :])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9))))
def test_merged_ranges_hold_the_same_samples_and_do_not_touch(pairs: list[tuple[int, int]]) -> None:
    ranges = [Range(start, start + length) for start, length in pairs]
    whole = merged(ranges)
    assert each(whole) == sorted(set(each(ranges)))
    assert all(before.stop < after.start for before, after in itertools.pairwise(whole))


# The book.


def test_what_was_given_back_comes_first_and_the_lowest_of_it() -> None:
    book = LeaseBook(BATCH)
    roster = Roster((0, 1, 2), book.changed)
    assert book.lease(Request(0, known=0, wanted=8, step=0)) == Grant((Range(0, 8),))
    assert book.lease(Request(1, known=0, wanted=8, step=0)) == Grant((Range(8, 16),))
    assert book.lease(Request(2, known=0, wanted=4, step=0)) == Grant((Range(16, 20),))
    book.saw(Settled(time_s=1.0, worker=0, samples=4))
    roster.remove(1)
    roster.remove(0)
    assert book.free == (Range(4, 16),)
    assert book.lease(Request(2, known=4, wanted=24, step=1)) == Grant((Range(4, 16), Range(20, 28)))


def test_a_request_that_is_repeated_has_the_same_answer() -> None:
    book = LeaseBook(BATCH)
    book.lease(Request(0, known=0, wanted=8, step=0))
    request = Request(1, known=0, wanted=12, step=0)
    assert book.lease(request) == book.lease(request) == Grant((Range(8, 20),))
    assert book.lease(Request(1, known=12, wanted=16, step=3)) == Grant((Range(20, 24),))


def test_a_worker_that_is_back_begins_anew() -> None:
    book = LeaseBook(BATCH)
    roster = Roster((0, 1), book.changed)
    book.lease(Request(0, known=0, wanted=8, step=0))
    roster.remove(0)
    roster.join(0)
    assert book.lease(Request(0, known=0, wanted=4, step=0)) == Grant((Range(0, 4),))


def test_what_becomes_of_the_leases_of_who_was_given_up_is_not_believed() -> None:
    book = LeaseBook(BATCH)
    roster = Roster((0, 1), book.changed)
    book.lease(Request(0, known=0, wanted=8, step=0))
    roster.remove(0)
    book.saw(Settled(time_s=1.0, worker=0, samples=8))
    assert book.free == (Range(0, 8),)


def test_lost_samples_are_free_at_once() -> None:
    book = LeaseBook(BATCH)
    book.lease(Request(0, known=0, wanted=12, step=0))
    book.saw(Settled(time_s=1.0, worker=0, samples=4))
    book.saw(Lost(time_s=2.0, worker=0, samples=4))
    assert book.free == (Range(4, 8),)
    assert book.held(0) == (Range(8, 12),)


def test_when_the_stream_is_used_up_all_are_told_the_same_last_step() -> None:
    """Worker 0 has leases up to its step 3, worker 1 up to its step 2: both end with step 3."""
    book = LeaseBook(BATCH, total=20)
    assert book.lease(Request(0, known=0, wanted=12, step=0)) == Grant((Range(0, 12),))
    assert book.lease(Request(1, known=0, wanted=12, step=0)) == Grant((Range(12, 20),), last_step=3)
    assert book.lease(Request(0, known=12, wanted=24, step=3)) == Grant((), last_step=3)


def test_what_is_given_back_after_the_end_goes_to_who_has_steps_left() -> None:
    book = LeaseBook(BATCH, total=20)
    roster = Roster((0, 1, 2), book.changed)
    book.lease(Request(0, known=0, wanted=12, step=0))
    book.lease(Request(1, known=0, wanted=12, step=0))
    roster.remove(0)
    assert book.lease(Request(1, known=8, wanted=16, step=2)) == Grant((Range(0, 4),), last_step=3)
    assert book.lease(Request(2, known=0, wanted=99, step=2)) == Grant((Range(4, 8),), last_step=3)


def test_a_checkpoint_keeps_what_is_settled_and_frees_the_rest() -> None:
    book = LeaseBook(BATCH)
    book.lease(Request(0, known=0, wanted=8, step=0))
    book.lease(Request(1, known=0, wanted=8, step=0))
    book.saw(Settled(time_s=1.0, worker=1, samples=4))
    again = LeaseBook(BATCH)
    again.restore(json.loads(json.dumps(book.state())))
    assert again.free == (Range(0, 8), Range(12, 16))
    assert again.lease(Request(0, known=0, wanted=16, step=0)) == Grant((Range(0, 8), Range(12, 20)))


def test_a_checkpoint_of_an_exhausted_stream_still_has_what_was_open() -> None:
    book = LeaseBook(BATCH, total=16)
    book.lease(Request(0, known=0, wanted=16, step=0))
    book.saw(Settled(time_s=1.0, worker=0, samples=8))
    again = LeaseBook(BATCH, total=16)
    again.restore(book.state())
    assert again.lease(Request(1, known=0, wanted=4, step=2)) == Grant((Range(8, 12),))
    assert again.lease(Request(2, known=0, wanted=8, step=2)) == Grant((Range(12, 16),), last_step=3)


steps = st.lists(
    st.tuples(
        st.sampled_from(["lease", "repeat", "settle", "lose", "leave", "join"]),
        st.integers(0, WORKERS - 1),
        st.integers(1, 5),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(steps, st.sampled_from([None, 40, 120]))
def test_no_sample_is_ever_held_by_two_and_none_disappears(
    story: list[tuple[str, int, int]], total: int | None
) -> None:
    """Whatever happens: below the newest lease each sample is free, held once, or settled once."""
    book = LeaseBook(BATCH, total)
    roster = Roster(tuple(range(WORKERS)), book.changed)
    granted: dict[int, list[int]] = {worker: [] for worker in range(WORKERS)}
    decided = Counter[int]()
    settled: list[int] = []
    top = 0
    for what, worker, count in story:
        here = worker in roster.members
        undecided = granted[worker][decided[worker] :]
        if what in ("lease", "repeat") and here:
            known = len(granted[worker])
            request = Request(worker, known, known + count * BATCH, step=known // BATCH)
            grant = book.lease(request)
            if what == "repeat":
                assert book.lease(request) == grant
            new = each(grant.ranges)
            assert total is not None or len(new) == count * BATCH
            assert all(start % BATCH == stop % BATCH == 0 for start, stop in grant.ranges)
            granted[worker] += new
            top = max([top, *(index + 1 for index in new)])
            if grant.last_step is not None:
                assert top == total
        elif what in ("settle", "lose") and here:
            samples = min(count * BATCH, len(undecided))
            kind = Settled if what == "settle" else Lost
            book.saw(kind(time_s=0.0, worker=worker, samples=samples))
            settled += undecided[:samples] if kind is Settled else []
            decided[worker] += samples
        elif what == "leave":
            roster.remove(worker)
            granted[worker], decided[worker] = [], 0
        elif what == "join" and not here:
            roster.join(worker)
        for other in range(WORKERS):
            assert each(book.held(other)) == granted[other][decided[other] :]
        states = Counter([*each(book.free), *settled, *(i for other in range(WORKERS) for i in each(book.held(other)))])
        assert states == Counter(range(top))


# What a journal proves.


def lived(worker: int, *records: Record) -> list[Record]:
    """Return the records of one worker's stay, a second apart."""
    joined = Joined(time_s=0.0, worker=worker, parameters=1)
    left = Left(
        time_s=9.0, worker=worker, reason="", step=0, seconds={}, sent_bytes=0, received_bytes=0, messages_sent=0
    )
    return [joined, *records, left]


def leased(worker: int, start: int, stop: int) -> Leased:
    return Leased(time_s=1.0, worker=worker, start=start, stop=stop)


def trained(worker: int, samples: int) -> Trained:
    return Trained(time_s=2.0, worker=worker, step=1, steps=1, samples=samples, seconds=0.0, loss=None)


def settle(worker: int, samples: int) -> Settled:
    return Settled(time_s=3.0, worker=worker, samples=samples)


def test_a_journal_names_what_is_missing_and_what_was_repeated() -> None:
    records = [
        *lived(0, leased(0, 0, 8), trained(0, 8), settle(0, 4)),  # dies with 4 .. 7
        *lived(1, leased(1, 8, 16), trained(1, 4)),  # dies with 8 .. 11, and never came to 12 .. 15
        *lived(2, leased(2, 4, 12), leased(2, 16, 20), trained(2, 12), settle(2, 12)),
    ]
    assert coverage(records) == Coverage(samples=20, missing=(Range(12, 16),), repeated=(Repeat(4, 12, times=2),))
    assert coverage(records).consumed == 12


def test_what_was_lost_is_missing_until_somebody_settles_it() -> None:
    lost = lived(0, leased(0, 0, 8), trained(0, 8), Lost(time_s=3.0, worker=0, samples=4), settle(0, 4))
    assert coverage(lost) == Coverage(samples=8, missing=(Range(0, 4),), repeated=())
    again = lived(1, leased(1, 0, 4), trained(1, 4), settle(1, 4))
    assert coverage([*lost, *again]) == Coverage(samples=8, missing=(), repeated=(Repeat(0, 4, times=2),))


def test_repeats_are_counted_piece_by_piece() -> None:
    records = [
        record
        for worker, (start, stop) in enumerate([(0, 12), (4, 8), (4, 16)])
        for record in lived(worker, leased(worker, start, stop), trained(worker, stop - start))
    ]
    assert coverage(records).repeated == (Repeat(4, 8, times=3), Repeat(8, 12, times=2))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([leased(0, 0, 4), trained(0, 8)], "'trained' at 2.0 s: it trained on 8 samples, of which it had leased 4"),
        ([leased(0, 0, 4), settle(0, 4)], "'settled' at 3.0 s: it settled 4 samples, of which it had trained on 0"),
        ([leased(1, 0, 4), *lived(1), trained(1, 4)], "worker 1, 'trained' at 2.0 s: .* leased 0"),
    ],
)
def test_a_journal_that_contradicts_itself_is_not_believed(records: list[Record], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        coverage(records)
