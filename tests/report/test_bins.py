"""Bins keep sums while they grow coarser."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from decentral.report.page.bins import LIMIT, Bins
from decentral.report.page.history import Thinned


@pytest.mark.parametrize("seed", range(5))
def test_sums_by_time_are_those_of_a_histogram_made_afterwards(seed: int) -> None:
    draw, bins = random.Random(seed), Bins()
    events = [(draw.uniform(0, 10.0 ** draw.uniform(-3, 5)), draw.randint(1, 9)) for _ in range(2000)]
    for time_s, amount in events:
        bins.add("key", time_s, amount)
    expected = [0.0] * LIMIT
    for time_s, amount in events:
        expected[math.floor(time_s / bins.width_s)] += amount
    assert bins.sums("key", LIMIT) == expected
    assert max(time_s for time_s, _ in events) >= bins.width_s * LIMIT / 2


@pytest.mark.parametrize("seed", range(5))
def test_what_is_spread_covers_its_time_evenly(seed: int) -> None:
    draw, bins = random.Random(seed), Bins()
    spans = []
    for _ in range(200):
        since = draw.uniform(0, 1000)
        spans.append((since, since + draw.choice([0.0, 0.01, 3.0, 400.0]), draw.uniform(1, 2)))
        bins.spread("key", *spans[-1])
    for place, total in enumerate(bins.sums("key", LIMIT)):
        low, high = place * bins.width_s, (place + 1) * bins.width_s
        shares = [
            amount * max(0.0, min(until, high) - max(since, low)) / (until - since)
            if until > since
            else amount * (low <= since < high)
            for since, until, amount in spans
        ]
        assert total == pytest.approx(math.fsum(shares), abs=1e-9)


def test_a_key_that_is_not_there_has_nothing() -> None:
    assert Bins().sums("nothing", 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [0, 1, 10, 11, 100, 1001])
def test_of_any_number_some_are_kept_evenly_and_the_last(count: int) -> None:
    thinned: Thinned[int] = Thinned(limit=10)
    for value in range(count):
        thinned.append(value)
    kept = thinned.values()
    assert len(kept) <= 11
    assert thinned.seen == count
    assert kept[:1] == list(range(count))[:1]
    assert kept[-1:] == list(range(count))[-1:]
    gaps = {after - before for before, after in pairwise(kept[:-1])}
    assert len(gaps) <= 1
