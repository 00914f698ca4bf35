"""Data parallelism with PowerSGD (arXiv 1905.13727) as its codec, bucket by bucket."""

from __future__ import annotations

import pytest
import torch
from cluster import all_equal, cluster, crash, replicas, short

from decentral.inner import SGD
from decentral.outcome import Outcome
from decentral.protocols import DDP, Buckets, Cut, Whole
from decentral.protocols.codecs import Codec, Float32, PowerSGD
from decentral.sim.simulate import simulate

WIDE = {"name": "cluster:Net", "hidden": 48}
"""Its matrices are [48, 3], [2, 48] and [1, 2]."""


def trained(codec: Codec, buckets: Cut, workers: int = 3, steps: int = 10) -> Outcome:
    rule = DDP(codec=codec, buckets=buckets)
    return simulate(cluster(rule, workers, steps, task=WIDE, inner=SGD(lr=0.1), batch_size=4))


@pytest.mark.parametrize("buckets", [Whole(), Buckets(megabytes=1e-4)], ids=short)
def test_with_full_rank_it_is_data_parallel(buckets: Cut) -> None:
    full = trained(PowerSGD(rank=3, min_compression=1.0), buckets)
    assert all_equal(full)
    assert torch.allclose(replicas(full), replicas(trained(Float32(), buckets)), atol=1e-4)


@pytest.mark.parametrize("buckets", [Whole(), Buckets(megabytes=1e-4)], ids=short)
def test_with_one_column_replicas_stay_equal_and_learn_what_it_leaves_out_later(buckets: Cut) -> None:
    low, exact = trained(PowerSGD(rank=1), buckets, steps=25), trained(Float32(), buckets, steps=25)
    assert all_equal(low)
    assert low.after["loss"] == pytest.approx(exact.after["loss"], rel=0.1)
    assert not torch.allclose(low.params[0], exact.params[0], atol=1e-4)


def test_it_sends_the_factors_alone() -> None:
    """A [48, 3] matrix as 48 + 3 numbers, a [2, 48] one as 50; the rest, and [1, 2], as they are."""
    low, exact = trained(PowerSGD(rank=1), Whole(), 2, 1), trained(Float32(), Whole(), 2, 1)
    saved = exact.left()[0].sent_bytes - low.left()[0].sent_bytes
    assert saved == pytest.approx(4 * (144 - 51 + 96 - 50), abs=300)  # two exchanges have two more headers


def test_when_somebody_leaves_the_others_stay_equal() -> None:
    rule = DDP(codec=PowerSGD(rank=1), buckets=Whole())
    outcome = simulate(cluster(rule, 3, 30, task=WIDE, events=[crash(1.0, 2)], detection_s=0.3))
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
