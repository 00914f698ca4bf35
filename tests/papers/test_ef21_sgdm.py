"""EF21-SGDM (arXiv 2305.15155) and EF21 (arXiv 2106.05203): data parallelism on compressed running means."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, outcomes, replicas, short
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.inner import AdamW
from decentral.protocols import DDP, EF21SGDM, Int8
from decentral.protocols.codecs import E3M0, EF21, Codec, Float32, TopK
from decentral.sim.simulate import simulate

EVERYTHING = EF21(codec=TopK(chunk=6, k=6, values=Float32()))
"""Leaves nothing out."""


def kept(values: Tensor, k: int) -> Tensor:
    """The k largest elements of each six, and zeros."""
    rows = values.view(-1, 6)
    smallest = rows.abs().topk(6 - k, dim=1, largest=False).indices
    return rows.scatter(1, smallest, 0.0).view(-1)


def reference(run: Run, eta: float, k: int) -> tuple[Tensor, Tensor]:
    """x <- x - lr g;  v_i <- (1 - eta) v_i + eta grad_i;  g_i <- g_i + C(v_i - g_i);  g the mean of the g_i."""
    plain = Plain(run)
    x = plain.start()
    averages = [torch.zeros_like(x) for _ in plain.workers]
    mirrors = [torch.zeros_like(x) for _ in plain.workers]
    for step in range(run.steps):
        for worker in plain.workers:
            gradient = plain.gradient(worker, step, x)
            averages[worker] = gradient if step == 0 else (1 - eta) * averages[worker] + eta * gradient
            mirrors[worker] = mirrors[worker] + kept(averages[worker] - mirrors[worker], k)
        x = x - run.inner.lr * sum(mirrors) / len(mirrors)
    return x, sum(mirrors) / len(mirrors)


@pytest.mark.parametrize(("eta", "k"), [(1.0, 2), (0.3, 2), (0.1, 5)])
def test_it_equals_the_reference(eta: float, k: int) -> None:
    codec = EF21(codec=TopK(chunk=6, k=k, values=Float32()))
    run = cluster(EF21SGDM(eta=eta, codec=codec), 3, 15, task=NOISY)
    outcome = simulate(run)
    x, mean = reference(run, eta, k)
    assert all_equal(outcome)
    assert close(outcome.params[0], x)
    assert close(outcome.slots[0]["sync.0.mirrors"], mean)
    mirrors = [slots["sync.0.mirror"] for slots in outcome.slots.values()]
    assert torch.allclose(torch.stack(mirrors).mean(dim=0), outcome.slots[1]["sync.0.mirrors"], atol=1e-6)


@pytest.mark.parametrize("inner", [None, AdamW(lr=0.02)])
def test_with_nothing_left_out_and_no_averaging_it_is_data_parallel(inner: AdamW | None) -> None:
    """In the paper's order, in which a step uses the gradient before, that is descent one step later."""
    exact = simulate(cluster(EF21SGDM(eta=1.0, codec=EVERYTHING), 3, 15, task=NET, inner=inner))
    assert torch.allclose(replicas(exact), replicas(simulate(cluster(DDP(), 3, 15, task=NET, inner=inner))), atol=1e-5)


def test_one_strong_coordinate_at_a_time_comes_to_the_optimum() -> None:
    """Unequal workers, one element of four a round: plain compression would stop elsewhere."""
    bowl = {"name": "quadratic", "dimension": 4, "curvature": (0.5, 1.0)}
    run = cluster(EF21SGDM(eta=1.0, codec=EF21(codec=TopK(chunk=4, k=1, values=Float32()))), 3, 120, task=bowl)
    optimum = Plain(run).task.optimum(3)
    assert torch.allclose(simulate(run).params[0], optimum, atol=1e-2)


def test_when_somebody_leaves_the_others_begin_with_new_mirrors() -> None:
    outcome = simulate(cluster(EF21SGDM(codec=EVERYTHING, eta=1.0), 3, 30, events=[crash(1.5, 2)], detection_s=0.3))
    found = outcomes(outcome)
    assert all(len(each) == 1 for each in found)
    assert next(iter(found[-1]))[1] == (0, 1)
    assert all_equal(outcome)
    mean = torch.stack([slots["sync.0.mirror"] for slots in outcome.slots.values()]).mean(dim=0)
    assert torch.allclose(mean, outcome.slots[0]["sync.0.mirrors"], atol=1e-6)


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_values_train_too(codec: Codec) -> None:
    outcome = simulate(cluster(EF21SGDM(codec=EF21(codec=codec)), 3, 40))
    assert all_equal(outcome)
    assert outcome.after["loss"] < 0.7 * outcome.before["loss"]


def test_time_alone() -> None:
    run = cluster(EF21SGDM(), 3, 6)
    timed, trained = simulate(run, timing_only=True), simulate(run)
    assert timed.seconds == trained.seconds
    assert [left.sent_bytes for left in timed.left()] == [left.sent_bytes for left in trained.left()]
