"""DeMo (arXiv 2411.19870) and Psyche's form of it: strongest frequencies of momenta, steps by signs."""

from __future__ import annotations

import math

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, short
from plain import NOISY, Plain
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.inner import SGD
from decentral.protocols import DCT, DeMo, Psyche, Sign
from decentral.protocols.codecs import E3M0, ErrorFeedback, Int8, TopK
from decentral.sim.simulate import simulate

SIZE = 12


def cosines() -> Tensor:
    """The orthonormal DCT-II of 12 points, row by row from its definition."""
    rows = [[math.cos(math.pi * (2 * j + 1) * u / (2 * SIZE)) for j in range(SIZE)] for u in range(SIZE)]
    scale = [math.sqrt((1 if u == 0 else 2) / SIZE) for u in range(SIZE)]
    return torch.tensor(rows, dtype=torch.float64) * torch.tensor(scale, dtype=torch.float64)[:, None]


def strongest(values: Tensor, k: int) -> Tensor:
    """The k largest coefficients of `values`, and zeros."""
    coefficients = cosines() @ values
    return coefficients * (coefficients.abs() >= coefficients.abs().topk(k).values[-1])


def demo_reference(run: Run, decay: float, k: int, weight_decay: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    plain, lr = Plain(run), run.inner.lr
    x, momenta = plain.start(), [torch.zeros(SIZE).double() for _ in plain.workers]
    for step in range(run.steps):
        sent = []
        for worker in plain.workers:
            accumulated = decay * momenta[worker] + lr * plain.gradient(worker, step, x)
            sent.append(cosines().T @ strongest(accumulated, k))
            momenta[worker] = accumulated - sent[-1]
        x = (1 - lr * weight_decay) * x - lr * (sum(sent) / len(sent)).sign()
    return x, momenta


def psyche_reference(run: Run, decay: float, k: int) -> Tensor:
    plain, lr = Plain(run), run.inner.lr
    x, momenta = plain.start(), [torch.zeros(SIZE).double() for _ in plain.workers]
    offered: list[Tensor] = []
    for step in range(run.steps + 1):
        if step < run.steps:
            gradients = [plain.gradient(worker, step, x - lr * momenta[worker].sign()) for worker in plain.workers]
        if offered:
            x = x - lr * (cosines().T @ sum(strongest(each, k).sign() for each in offered)).sign()
            momenta = [each - cosines().T @ strongest(sent, k) for each, sent in zip(momenta, offered, strict=True)]
        if step < run.steps:
            momenta = [decay * each + lr * g for each, g in zip(momenta, gradients, strict=True)]
            offered = momenta
    return x


@pytest.mark.parametrize(("workers", "k"), [(1, 3), (3, 3), (4, 5)])
def test_demo_equals_the_reference(workers: int, k: int) -> None:
    rule = DeMo(decay=0.9, codec=DCT(k=k))
    run = cluster(rule, workers, 12, task=NOISY, inner=SGD(lr=0.01, weight_decay=0.1))
    outcome = simulate(run)
    x, momenta = demo_reference(run, 0.9, k, weight_decay=0.1)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0].double(), x, atol=2e-6)
    for worker, momentum in enumerate(momenta):
        assert torch.allclose(outcome.slots[worker]["momentum"].double(), momentum, atol=2e-6)


def test_with_every_coefficient_nothing_is_kept_and_the_step_is_the_sign_of_the_mean_gradient() -> None:
    run = cluster(DeMo(codec=DCT(k=4096)), 3, 10, task=NOISY, inner=SGD(lr=0.01))
    plain = Plain(run)
    x = plain.start()
    for step in range(10):
        x = x - 0.01 * sum(plain.gradient(worker, step, x) for worker in plain.workers).sign()
    outcome = simulate(run)
    assert torch.allclose(outcome.params[0].double(), x, atol=1e-6)
    assert all(slots["momentum"].abs().max() < 1e-6 for slots in outcome.slots.values())


def test_coarse_values_change_what_arrives_but_not_what_is_forgotten() -> None:
    run, signs = (
        cluster(DeMo(decay=0.9, codec=codec), 3, 1, task=NOISY) for codec in (DCT(k=3), DCT(k=3, values=Sign()))
    )
    exact, coarse = simulate(run), simulate(signs)
    assert torch.equal(exact.slots[1]["momentum"], coarse.slots[1]["momentum"])
    assert not torch.equal(exact.params[1], coarse.params[1])


@pytest.mark.parametrize(("workers", "k"), [(1, 3), (3, 3)])
def test_psyche_equals_the_reference(workers: int, k: int) -> None:
    rule = Psyche(decay=0.9, codec=DCT(k=k, values=Sign()))
    run = cluster(rule, workers, 10, task=NOISY, inner=SGD(lr=0.01))
    outcome = simulate(run)
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0].double(), psyche_reference(run, 0.9, k), atol=2e-6)


def test_psyches_round_travels_while_the_next_gradient_is_computed() -> None:
    slow = {"latency_s": 0.01, "step_time_s": 0.05, "task": NET}
    overlapped, waiting = (simulate(cluster(rule, 3, 8, **slow)).seconds for rule in (Psyche(), DeMo()))
    assert overlapped < 8 * 0.05 + 0.06
    assert waiting > 8 * 0.05 + 8 * 0.01


def test_a_coefficient_of_a_tile_of_64_x_64_costs_13_bits() -> None:
    """Twelve say which and one says whether it is positive: 0.0127 bits a parameter with four of them."""
    codec = Psyche().codec.fit([(128, 128)])
    packet = codec.encode(torch.randn(128 * 128, generator=torch.Generator().manual_seed(0)))
    assert packet.nbytes * 8 == 4 * 4 * 13
    assert codec.decode(packet, torch.empty(128 * 128)).norm().item() == pytest.approx(4.0)  # sixteen of length one


def test_signs_are_a_bit_each() -> None:
    values = torch.tensor([0.5, -2.0, 0.0, 3e-9, -1e30, 1.0, 1.0, -1.0, -7.0])
    assert Sign().encode(values).nbytes == 2
    assert Sign().round_trip(values).tolist() == [1, -1, 1, 1, -1, 1, 1, -1, -1]


@pytest.mark.parametrize("rule", [DeMo(codec=DCT(k=3)), Psyche()], ids=lambda rule: rule.name)
def test_when_somebody_leaves_the_others_stay_equal(rule: DeMo) -> None:
    run = cluster(rule, 3, 20, inner=SGD(lr=0.03), events=[crash(0.8, 2)], detection_s=0.3)
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0(), TopK(chunk=6, k=2)], ids=short)
def test_other_codecs_travel_too(codec: Int8 | E3M0 | TopK) -> None:
    outcome = simulate(cluster(DeMo(codec=codec), 3, 20, inner=SGD(lr=0.02)))
    assert all_equal(outcome)
    assert outcome.after["loss"] < 0.8 * outcome.before["loss"]


@pytest.mark.parametrize("rule", [DeMo(), Psyche()], ids=lambda rule: rule.name)
def test_time_alone(rule: DeMo) -> None:
    run = cluster(rule, 3, 4, task=NET)
    timed, trained = simulate(run, timing_only=True), simulate(run)
    assert timed.seconds == trained.seconds
    assert [left.sent_bytes for left in timed.left()] == [left.sent_bytes for left in trained.left()]


def test_a_second_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule\.codec: 'error_feedback' remembers"):
        DeMo(codec=ErrorFeedback(codec=DCT())).check(3)
