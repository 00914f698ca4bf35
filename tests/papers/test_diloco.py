"""DiLoCo (arXiv 2311.08105) against closed forms and against an independent reference on plain tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from cluster import NET, all_equal, cluster, quadratic, replicas, rounds, short
from torch import Tensor

from decentral.config import Run
from decentral.inner import SGD, AdamW, Inner
from decentral.journal import Trained
from decentral.protocols import DDP, DiLoCo, Every, LocalSGD, Nesterov, OuterSGD, SyncRule
from decentral.sim.simulate import simulate

NOISY = {"name": "quadratic", "dimension": 12, "curvature": (0.2, 2.0), "noise": 0.3}


def reference(run: Run, steps_per_round: int, eta: float, mu: float) -> tuple[Tensor, Tensor]:
    """DiLoCo as in algorithm 1, on plain float64 tensors: (anchor, momentum). Shares no code with the rule."""
    task = quadratic(run)
    curvature = task.curvatures().double()
    anchor = torch.full((task.dimension,), task.start, dtype=torch.float64)
    momentum = torch.zeros_like(anchor)
    workers = [_Adam() if isinstance(run.inner, AdamW) else _HeavyBall() for _ in range(run.fleet.size)]
    for first in range(0, run.steps, steps_per_round):
        deltas = []
        for worker, optimizer in enumerate(workers):
            x = anchor.clone()
            for step in range(first, min(first + steps_per_round, run.steps)):
                noise = task.batch(worker, step * run.batch_size, run.batch_size)[1].double().mean(dim=0)
                gradient = curvature * (x - task.centre(worker).double()) + noise
                x = optimizer(x, gradient, run.inner)
            deltas.append(anchor - x)
        mean = sum(deltas) / len(deltas)
        momentum = mu * momentum + mean
        anchor = anchor - eta * (mean + mu * momentum)
    return anchor, momentum


class _HeavyBall:
    def __init__(self) -> None:
        self.velocity: Tensor | float = 0.0

    def __call__(self, x: Tensor, gradient: Tensor, inner: Inner) -> Tensor:
        assert isinstance(inner, SGD)
        self.velocity = inner.momentum * self.velocity + gradient
        return x - inner.lr * self.velocity


class _Adam:
    def __init__(self) -> None:
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.count = 0

    def __call__(self, x: Tensor, gradient: Tensor, inner: Inner) -> Tensor:
        assert isinstance(inner, AdamW)
        (b1, b2), self.count = inner.betas, self.count + 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        m, v = self.m / (1 - b1**self.count), self.v / (1 - b2**self.count)
        return (1 - inner.lr * inner.weight_decay) * x - inner.lr * m / (v.sqrt() + inner.eps)


@pytest.mark.parametrize("inner", [SGD(lr=0.05), SGD(lr=0.05, momentum=0.8), AdamW(lr=0.02)], ids=short)
@pytest.mark.parametrize(("workers", "steps"), [(1, 25), (3, 25), (4, 23)])
def test_diloco_equals_the_reference(inner: Inner, workers: int, steps: int) -> None:
    run = cluster(DiLoCo(period=5), workers, steps, task=NOISY, inner=inner, batch_size=2)
    outcome = simulate(run)
    anchor, momentum = reference(run, 5, eta=0.7, mu=0.9)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0].double(), anchor, rtol=0, atol=2e-6)
    assert torch.allclose(outcome.slots[0]["momentum"].double(), momentum, rtol=0, atol=2e-6)
    assert torch.equal(outcome.slots[0]["anchor"], outcome.params[0])


@pytest.mark.parametrize("inner", [SGD(lr=0.05), AdamW(lr=0.02)], ids=short)
def test_local_sgd_equals_the_reference_with_a_plain_mean(inner: Inner) -> None:
    run = cluster(LocalSGD(period=5), 3, 23, task=NOISY, inner=inner, batch_size=2)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0].double(), reference(run, 5, eta=1.0, mu=0.0)[0], rtol=0, atol=2e-6)


def test_the_first_round_comes_after_exactly_h_steps_and_the_last_with_the_budget() -> None:
    outcome = simulate(cluster(DiLoCo(period=7), 3, steps=17))
    phases = [record.steps for record in outcome.records if isinstance(record, Trained) and record.worker == 0]
    assert phases == [7, 7, 3]
    assert list(rounds(outcome)) == [1, 2, 3]


def test_the_outer_gradient_does_not_die_after_the_first_round() -> None:
    """An anchor that shares storage with the parameters has none. There is no momentum that could hide it."""
    rule = DiLoCo(period=4, outer=OuterSGD())
    anchors = [simulate(cluster(rule, 2, steps)).slots[0]["anchor"] for steps in (4, 8, 12, 16)]
    moves = [(after - before).norm() for before, after in itertools.pairwise(anchors)]
    assert all(move > 0.01 for move in moves)


@pytest.mark.parametrize("rule", [DiLoCo(period=3), LocalSGD(period=3)], ids=lambda rule: rule.name)
def test_what_a_rule_remembers_shares_no_storage(rule: SyncRule) -> None:
    outcome = simulate(cluster(rule, 3, 9))
    held = [tensor for worker in outcome.params for tensor in (outcome.params[worker], *outcome.slots[worker].values())]
    places = sorted((tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()) for tensor in held)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))


def test_one_round_of_outer_sgd_is_the_mean_of_closed_forms() -> None:
    run = cluster(DiLoCo(period=20, outer=OuterSGD()), 4, 20)
    task = quadratic(run)
    soup = torch.stack([task.after_sgd(worker, 0.1, 20) for worker in range(4)]).mean(dim=0)
    assert torch.allclose(simulate(run).params[0], soup, atol=1e-6)


@pytest.mark.parametrize("period", [1, 4, 5])
@pytest.mark.parametrize("inner", [SGD(lr=0.1), AdamW(lr=0.05)], ids=short)
def test_plain_outer_sgd_is_local_sgd_bit_for_bit(period: int, inner: Inner) -> None:
    diloco = simulate(cluster(DiLoCo(period=period, outer=OuterSGD()), 3, 12, task=NET, inner=inner))
    local = simulate(cluster(LocalSGD(period=period), 3, 12, task=NET, inner=inner))
    assert torch.equal(replicas(diloco), replicas(local))


@pytest.mark.parametrize(
    "inner", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), SGD(lr=0.1, momentum=0.9, nesterov=True)], ids=short
)
def test_local_sgd_every_step_is_data_parallel_for_linear_inner_optimisers(inner: Inner) -> None:
    """With momentum too: gradients are taken at equal points, and the mean of the velocities is the mean's velocity."""
    every_step = simulate(cluster(LocalSGD(period=1), 4, 20, task=NET, inner=inner))
    data_parallel = simulate(cluster(DDP(), 4, 20, task=NET, inner=inner))
    assert torch.allclose(every_step.params[0], data_parallel.params[0], atol=2e-6)


@pytest.mark.parametrize(
    ("period", "inner"),
    [(1, AdamW(lr=0.05)), (1, SGD(lr=0.1, clip_norm=0.3)), (4, SGD(lr=0.1)), (4, SGD(lr=0.1, momentum=0.9))],
    ids=short,
)
def test_local_sgd_is_not_data_parallel_for_others_nor_for_longer_phases(period: int, inner: Inner) -> None:
    local = simulate(cluster(LocalSGD(period=period), 4, 20, task=NET, inner=inner))
    data_parallel = simulate(cluster(DDP(), 4, 20, task=NET, inner=inner))
    assert (local.params[0] - data_parallel.params[0]).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
def test_one_worker_with_outer_sgd_is_lookahead(eta: float) -> None:
    run = cluster(DiLoCo(period=6, outer=OuterSGD(lr=eta)), 1, 24)
    task = quadratic(run)
    slow = torch.full((16,), task.start)
    for _ in range(4):
        slow = slow + eta * (task.after_sgd(0, 0.1, 6, x0=slow) - slow)
    assert torch.allclose(simulate(run).params[0], slow, atol=1e-6)


def test_workers_with_the_same_data_are_as_good_as_one() -> None:
    same = {"name": "quadratic", "dimension": 12, "spread": 0.0}
    alone, *more = [simulate(cluster(DiLoCo(period=4), k, 20, task=same)).params[0] for k in (1, 2, 3, 4, 8)]
    for k, params in zip((2, 3, 4, 8), more, strict=True):
        if k == 3:  # a third of three times a float32 may be its neighbour
            assert torch.allclose(params, alone, atol=1e-6)
        else:
            assert torch.equal(params, alone)


@pytest.mark.parametrize("outer", [Nesterov(lr=0.3, momentum=0.8), OuterSGD(lr=0.3, momentum=0.8), OuterSGD(lr=0.3)])
def test_outer_optimisers_are_torch_sgd(outer: Nesterov | OuterSGD) -> None:
    generator = torch.Generator().manual_seed(1)
    anchor, momentum = torch.randn(50, generator=generator), torch.zeros(50)
    parameter = torch.nn.Parameter(anchor.clone())
    torch_sgd = torch.optim.SGD([parameter], lr=outer.lr, momentum=outer.momentum, nesterov=isinstance(outer, Nesterov))
    for _ in range(6):
        gradient = torch.randn(50, generator=generator)
        kept = gradient.clone()
        parameter.grad = gradient.clone()
        torch_sgd.step()
        outer.step(anchor, gradient, momentum)
        assert torch.equal(gradient, kept)
        assert torch.allclose(anchor, parameter.data, atol=1e-6)


def test_nesterov_moves_by_its_first_and_its_steady_step() -> None:
    outer, anchor, momentum = Nesterov(), torch.zeros(1), torch.zeros(1)
    outer.step(anchor, torch.ones(1), momentum)
    assert anchor.item() == pytest.approx(-0.7 * 1.9)
    for _ in range(400):
        before = anchor.item()
        outer.step(anchor, torch.ones(1), momentum)
    assert anchor.item() - before == pytest.approx(-0.7 / (1 - 0.9), rel=1e-4)


def test_defaults_are_the_papers() -> None:
    rule = DiLoCo()
    assert (rule.period, rule.outer) == (Every(period=500), Nesterov(lr=0.7, momentum=0.9))
