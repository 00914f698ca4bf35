"""Just One Byte (arXiv 2306.10015) and FedKSeed (arXiv 2312.06353): training by losses alone."""

from __future__ import annotations

import math
import random

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, drive, outcomes, short
from plain import NOISY, Plain
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.inner import SGD, AdamW
from decentral.peer import Peer
from decentral.protocols import FedKSeed, Int8, JustOneByte
from decentral.protocols.codecs import E3M0, Codec, Float32, OneByte, PowerSGD, TopK
from decentral.protocols.zeroth_order import direction, slope
from decentral.replica import seed_of
from decentral.sim.simulate import simulate

SLOW = SGD(lr=0.02)


def normals(*seed: object) -> Tensor:
    """The normal numbers that belong to a seed, [12] float64."""
    generator = torch.Generator().manual_seed(seed_of(0, *seed))
    return torch.randn(12, generator=generator).double()


# -- slopes -----------------------------------------------------------------------------------------------------------


async def slopes(peer: Peer) -> tuple[list[float], bool, float]:
    before, began = peer.params.clone(), peer.now()
    found = [await slope(peer, seed, 1e-2) for seed in range(5)]
    return found, torch.equal(before, peer.params), peer.now() - began


def test_a_slope_is_the_gradients_part_along_the_direction() -> None:
    """Exactly so on a quadratic; it costs two forward passes and leaves the parameters as they were."""
    run = cluster(JustOneByte(), 2, task=NOISY)
    plain = Plain(run)
    for worker, (found, unchanged, seconds) in drive(slopes, 2, task=NOISY).items():
        gradient = plain.gradient(worker, 0, plain.start())
        expected = [float(gradient @ direction(seed, torch.zeros(12)).double()) for seed in range(5)]
        assert found == pytest.approx(expected, abs=2e-3)
        assert unchanged
        assert seconds == pytest.approx(5 * 2 / 3 * run.fleet.step_time_s)


def test_slopes_times_directions_are_the_gradient_on_the_average() -> None:
    """The relative error of N samples in d dimensions is about sqrt((d + 1) / N)."""
    gradient, count = torch.linspace(-1, 1, 12), 3000
    along = torch.stack([direction(seed, gradient) for seed in range(count)])
    mean = ((along @ gradient)[:, None] * along).mean(dim=0)
    error = float((mean - gradient).norm() / gradient.norm())
    assert error == pytest.approx(math.sqrt(13 / count), rel=0.5)


# -- just one byte ----------------------------------------------------------------------------------------------------


def byte_reference(run: Run, samples: int) -> Tensor:
    """x <- x - lr / sqrt(N) sum_ij <grad_i, z_ij> z_ij on float64 tensors."""
    plain = Plain(run)
    x, count = plain.start(), samples * run.fleet.size
    for step in range(run.steps):
        change = torch.zeros(12).double()
        for worker in plain.workers:
            gradient = plain.gradient(worker, step, x)
            for sample in range(samples):
                z = normals("just one byte", worker, step + 1, sample)
                change += float(gradient @ z) * z
        x = x - run.inner.lr / math.sqrt(count) * change
    return x


@pytest.mark.parametrize("workers", [1, 3])
def test_just_one_byte_equals_the_reference_with_exact_slopes(workers: int) -> None:
    run = cluster(JustOneByte(samples=4, epsilon=1e-2, codec=Float32()), workers, 8, task=NOISY, inner=SLOW)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0].double(), byte_reference(run, 4), atol=2e-3)


def test_bytes_train_and_cost_a_byte_each() -> None:
    exact, coarse = (
        simulate(cluster(JustOneByte(samples=8, codec=codec), 3, 12, inner=SLOW)) for codec in (Float32(), OneByte())
    )
    assert all_equal(coarse)
    assert coarse.after["loss"] < 0.8 * coarse.before["loss"]
    saved = exact.left()[0].sent_bytes - coarse.left()[0].sent_bytes
    # Of every slope three bytes to each of two others; packets of another codec have other headers.
    assert saved == pytest.approx(12 * 2 * 8 * 3, abs=12 * 2 * 4)


def test_any_inner_optimiser_steps_alike_everywhere() -> None:
    outcome = simulate(cluster(JustOneByte(samples=4), 3, 10, task=NET, inner=AdamW(lr=0.02)))
    assert all_equal(outcome)


def test_when_somebody_leaves_the_others_stay_equal() -> None:
    outcome = simulate(cluster(JustOneByte(samples=3), 3, 20, inner=SLOW, events=[crash(1.0, 2)], detection_s=0.1))
    found = outcomes(outcome, "slopes")
    assert all_equal(outcome)
    assert next(iter(found[-1])) == ("committed", (0, 1))
    assert {outcome for ((outcome, _),) in found} <= {"committed", "degraded", "skipped"}


# -- fedkseed ---------------------------------------------------------------------------------------------------------


def seeds_reference(run: Run, period: int, count: int) -> Tensor:
    """Local steps along known directions on float64 tensors; then w0 - sum_k mean_i a_ik z_k."""
    plain, lr = Plain(run), run.inner.lr
    anchor = plain.start()
    for first in range(0, run.steps, period):
        sums = torch.zeros(count).double()
        for worker in plain.workers:
            x = anchor
            for step in range(first, min(first + period, run.steps)):
                chosen = random.Random(seed_of(0, f"fedkseed {worker}", step)).randrange(count)
                z = normals("fedkseed", chosen)
                steepness = float(plain.gradient(worker, step, x) @ z)
                x = x - lr * steepness * z
                sums[chosen] += lr * steepness / run.fleet.size
        anchor = anchor - sum(sums[k] * normals("fedkseed", k) for k in range(count))
    return anchor


@pytest.mark.parametrize("workers", [1, 3])
def test_fedkseed_equals_the_reference(workers: int) -> None:
    run = cluster(FedKSeed(period=5, seeds=8, epsilon=1e-2), workers, 18, task=NOISY, inner=SLOW)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0].double(), seeds_reference(run, 5, 8), atol=2e-3)


def test_what_one_worker_has_done_is_what_its_sums_repeat() -> None:
    """No matter when it is repeated: the sums hold the learning rates, which follow a schedule."""
    inner = SGD(lr=0.05, schedule="cosine")
    often, once = (
        simulate(cluster(FedKSeed(period=period, seeds=16), 1, 20, inner=inner)).params[0] for period in (2, 20)
    )
    assert torch.allclose(often, once, atol=2e-4)  # slopes of float32 losses differ by rounding
    assert (once - 1).norm() > 0.1


def test_fedkseed_sends_sums_and_no_vectors() -> None:
    outcome = simulate(cluster(FedKSeed(period=10, seeds=8, all_reduce="gather"), 2, 20, task=NET, inner=SLOW))
    assert outcome.left()[0].sent_bytes < 2 * (8 * 4 + 64)  # a packet in each of two rounds, headers included
    assert all_equal(outcome)


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_sums_train_too_and_a_worker_may_leave(codec: Codec) -> None:
    run = cluster(FedKSeed(period=5, seeds=64, codec=codec), 3, 60, inner=SLOW, events=[crash(1.0, 2)])
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
    assert outcome.after["loss"] < 0.9 * outcome.before["loss"]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule\.codec: 'powersgd' is for weight matrices"):
        FedKSeed(codec=PowerSGD(), all_reduce="gather").check(3)
    with pytest.raises(ConfigError, match=r"rule\.codec: 'topk' leaves numbers out"):
        JustOneByte(codec=TopK()).check(3)
    for inner in (AdamW(), SGD(lr=0.1, momentum=0.9), SGD(lr=0.1, weight_decay=0.1)):
        with pytest.raises(ConfigError, match="plain SGD alone"):
            simulate(cluster(FedKSeed(period=2), 2, 4, inner=inner))


@pytest.mark.parametrize("rule", [JustOneByte(samples=2), FedKSeed(period=3, seeds=8)], ids=lambda rule: rule.name)
def test_time_alone(rule: JustOneByte | FedKSeed) -> None:
    run = cluster(rule, 3, 6, inner=SLOW)
    timed, trained = simulate(run, timing_only=True), simulate(run)
    assert timed.seconds == trained.seconds
    assert [left.sent_bytes for left in timed.left()] == [left.sent_bytes for left in trained.left()]
