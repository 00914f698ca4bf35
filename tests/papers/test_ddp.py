"""Data parallelism: one process on the mean gradient, however the gradient is cut and carried."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cluster import NET, Net, all_equal, cluster, outcomes, replicas, rounds, short
from torch import nn

from decentral.inner import SGD, AdamW, Inner
from decentral.protocols import DDP, BFloat16, Buckets, Codec, Cut, Float32, Int8, Layers, Whole
from decentral.protocols.collectives import AllReduce
from decentral.replica import initial_model
from decentral.sim.simulate import simulate

TINY_BUCKETS = Buckets(megabytes=1e-6)


def single_process(inner: Inner, workers: int, steps: int, batch_size: int) -> torch.Tensor:
    """Train one model with torch's own optimisers on the mean of the workers' gradients; return [P]."""
    task = Net()
    model = initial_model(task, 0)
    optimizer = torch_optimizer(inner, model)
    for step in range(steps):
        optimizer.zero_grad()
        losses = [task.loss(model, task.batch(worker, step * batch_size, batch_size)) for worker in range(workers)]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def torch_optimizer(inner: Inner, model: nn.Module) -> torch.optim.Optimizer:
    if isinstance(inner, AdamW):
        return torch.optim.AdamW(model.parameters(), lr=inner.lr, betas=inner.betas, weight_decay=inner.weight_decay)
    assert isinstance(inner, SGD)
    return torch.optim.SGD(model.parameters(), lr=inner.lr, momentum=inner.momentum, weight_decay=inner.weight_decay)


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize(
    "inner", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9, weight_decay=0.01), AdamW(lr=0.02)], ids=short
)
@pytest.mark.parametrize("buckets", [Whole(), TINY_BUCKETS], ids=short)
def test_ddp_equals_one_process_on_the_mean_gradient(workers: int, inner: Inner, buckets: Cut) -> None:
    run = cluster(DDP(buckets=buckets), workers, 15, task=NET, inner=inner, batch_size=3)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0], single_process(inner, workers, 15, 3), atol=1e-5)


def final(workers: int = 3, **fields: Any) -> torch.Tensor:
    outcome = simulate(cluster(DDP(**fields), workers, 8, task=NET))
    assert all_equal(outcome)
    return replicas(outcome)[0]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_buckets_change_no_bit_in_the_butterfly(workers: int) -> None:
    """Each element is summed in ascending order of workers wherever its chunk ends."""
    whole = final(workers, buckets=Whole())
    for buckets in (Buckets(), TINY_BUCKETS, Buckets(megabytes=3e-5), Layers(layers=1)):
        assert torch.equal(final(workers, buckets=buckets), whole)


@pytest.mark.parametrize("all_reduce", ["ring", "tree"])
def test_the_other_all_reduces_agree_to_rounding(all_reduce: AllReduce) -> None:
    """The tree sums every element alike, so buckets change no bit; the ring's order depends on the chunk."""
    whole = final(5, buckets=Whole(), all_reduce=all_reduce)
    cut = final(5, buckets=TINY_BUCKETS, all_reduce=all_reduce)
    assert torch.allclose(whole, final(5), atol=1e-6)
    assert torch.equal(whole, cut) if all_reduce == "tree" else torch.allclose(whole, cut, atol=1e-6)


@pytest.mark.parametrize("codec", [Float32(), BFloat16(), Int8()], ids=short)
@pytest.mark.parametrize("all_reduce", ["butterfly", "ring", "tree"])
def test_replicas_stay_bit_identical(codec: Codec, all_reduce: AllReduce) -> None:
    final(5, codec=codec, all_reduce=all_reduce, buckets=TINY_BUCKETS)


def test_there_is_one_round_a_step() -> None:
    outcome = simulate(cluster(DDP(buckets=TINY_BUCKETS), 3, 8, task=NET))
    assert outcomes(outcome) == [{("committed", (0, 1, 2))}] * 8
    assert list(rounds(outcome)) == list(range(1, 9))


class Forked(Net):
    """Even workers never reach the first layer's bias, so their buckets become final in another order."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        first = model[0]  # type: ignore[index]
        even = bool(targets[0] < 0)
        hidden = inputs @ first.weight.T if even else first(inputs)
        rest = copy.copy(list(model.children())[1:])  # type: ignore[attr-defined]
        for layer in rest:
            hidden = layer(hidden)
        return (hidden - targets).square().mean()


def test_workers_whose_buckets_come_in_different_orders_still_match_them_up() -> None:
    run = cluster(DDP(buckets=TINY_BUCKETS), 4, 10, task={"name": "test_ddp:Forked", "hidden": 2})
    outcome = simulate(run)
    assert outcomes(outcome) == [{("committed", (0, 1, 2, 3))}] * 10
    whole = simulate(cluster(DDP(buckets=Whole()), 4, 10, task={"name": "test_ddp:Forked", "hidden": 2}))
    assert torch.equal(replicas(outcome), replicas(whole))
