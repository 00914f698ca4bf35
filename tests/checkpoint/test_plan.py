"""Who writes what: everything once, by somebody who has it, and everybody as much."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shelf import fleet, snapshot

from decentral.checkpoint.contents import describe
from decentral.checkpoint.manifest import CHUNK, Description
from decentral.checkpoint.plan import plan, uneven


def described(snapshots: dict[int, object]) -> dict[int, Description]:
    return {worker: describe(worker, each) for worker, each in snapshots.items()}  # type: ignore[arg-type]


@given(seed=st.integers(0, 10_000), workers=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_every_chunk_is_written_once_by_a_holder(seed: int, workers: int) -> None:
    chance = random.Random(seed)
    pool = [torch.full((chance.randint(1, 50),), float(index)) for index in range(8)]
    descriptions = described(
        {
            worker: snapshot(1, **{f"t{i}": pool[i] for i in chance.sample(range(8), chance.randint(1, 8))})
            for worker in range(workers)
        }
    )
    shares = plan(descriptions)
    holds = {
        worker: {digest for held in each.tensors for digest in held.chunks} for worker, each in descriptions.items()
    }
    writers = Counter(digest for share in shares.values() for digest in share)
    assert set(writers) == set.union(*holds.values())
    assert set(writers.values()) == {1}
    assert all(set(share) <= holds[worker] for worker, share in shares.items())


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_equal_workers_write_equally_much(workers: int) -> None:
    large = torch.randn(10 * CHUNK // 4 + 17, generator=torch.Generator().manual_seed(1))
    descriptions = described({worker: snapshot(1, params=large) for worker in range(workers)})
    sizes = {digest: nbytes for held in descriptions[0].tensors for digest, nbytes in held.sizes()}
    loads = [sum(sizes[digest] for digest in share) for share in plan(descriptions).values()]
    assert sum(loads) == 4 * large.numel()
    assert max(loads) - min(loads) <= CHUNK


def test_workers_between_different_rounds_are_told_apart() -> None:
    even = described(dict(fleet(3)))
    assert uneven(even) == ""
    late = {**even, 1: describe(1, fleet(4)[1])}
    assert uneven(late) == "workers [0, 2] after round 3 of 'sync'; workers [1] after round 4 of 'sync'"
