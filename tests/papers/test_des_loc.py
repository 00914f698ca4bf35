"""DES-LOC (arXiv 2505.22549) and MT-DAO (arXiv 2510.05361) against references on plain tensors, and what they send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, replicas
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.inner import ADOPT, SGD, AdamW, Inner, QHAdam
from decentral.peer import Peer
from decentral.protocols import DESLOC, MTDAO, Int8, LocalSGD, SyncRule
from decentral.sim.simulate import simulate

State = dict[int, dict[str, Tensor]]


def keeping(rule: SyncRule) -> tuple[SyncRule, State]:
    """Return the rule, and where it leaves each worker's inner state when it ends."""
    base, kept = type(rule), {}

    class Keeping(base):  # type: ignore[misc, valid-type]
        async def run(self, peer: Peer) -> None:
            await super().run(peer)
            names = (*peer.inner.momenta, *peer.inner.variances)
            kept[peer.id] = {name: peer.inner_state(name).clone() for name in names}

    return Keeping(**{field: getattr(rule, field) for field in base.model_fields}), kept


def reference(run: Run, periods: tuple[int, ...]) -> list[list[Tensor]]:
    """Average what is due, then step, on plain tensors: each worker's (x, the momenta, v) at the end."""
    plain = Plain(run)
    update = qhadam if isinstance(run.inner, QHAdam) else adopt
    states = [[plain.start(), *[torch.zeros_like(plain.start())] * (len(periods) - 1)] for _ in plain.workers]
    for step in range(run.steps + 1):
        for which, period in enumerate(periods):
            if step and (step % period == 0 or (which == 0 and step == run.steps)):
                mean = torch.stack([state[which] for state in states]).mean(dim=0)
                for state in states:
                    state[which] = mean
        if step < run.steps:
            for worker, state in enumerate(states):
                states[worker] = update(run.inner, step, plain.gradient(worker, step, state[0]), *state)
    return states


def qhadam(inner: Any, step: int, g: Tensor, x: Tensor, *uv: Tensor) -> list[Tensor]:
    """Adam without bias correction, with any number of momenta."""
    *u, v = uv
    u = [beta * each + (1 - beta) * g for beta, each in zip(inner.decays, u, strict=True)]
    v = inner.beta2 * v + (1 - inner.beta2) * g**2
    mixed = (1 - sum(inner.weights)) * g + sum(omega * each for omega, each in zip(inner.weights, u, strict=True))
    return [x - inner.lr * mixed / (v.sqrt() + inner.eps), *u, v]


def adopt(inner: Any, step: int, g: Tensor, x: Tensor, *uv: Tensor) -> list[Tensor]:
    """The gradient is divided by the v of the steps before, and cut; the first one only sets v."""
    *u, v = uv
    if step == 0:
        return [x, *u, g**2]
    n = (g / v.sqrt().clamp(min=inner.eps)).clamp(-(step**0.25), step**0.25)
    u = [beta * each + (1 - beta) * n for beta, each in zip(inner.decays, u, strict=True)]
    mixed = (1 - sum(inner.weights)) * n + sum(omega * each for omega, each in zip(inner.weights, u, strict=True))
    return [x - inner.lr * mixed, *u, inner.beta2 * v + (1 - inner.beta2) * g**2]


@pytest.mark.parametrize("periods", [(2, 6, 12), (3, 3, 3), (2, 3, 5), (4, 1, 100)])
@pytest.mark.parametrize("omega", [1.0, 0.7])
def test_des_loc_equals_the_reference(periods: tuple[int, int, int], omega: float) -> None:
    inner = QHAdam(lr=0.02, decays=(0.8,), weights=(omega,), beta2=0.95, eps=1e-3)
    rule, kept = keeping(DESLOC(period=periods[0], momentum_periods=(periods[1],), variance_period=periods[2]))
    run = cluster(rule, 3, 23, task=NOISY, inner=inner, batch_size=2)
    outcome = simulate(run)
    for worker, (x, u, v) in enumerate(reference(run, periods)):
        assert torch.allclose(outcome.params[worker].double(), x, rtol=0, atol=2e-5)
        assert close(kept[worker]["exp_avg_0"], u)
        assert close(kept[worker]["exp_avg_sq"], v)


@pytest.mark.parametrize("inner", [QHAdam, ADOPT])
def test_mt_dao_equals_the_reference_with_a_period_for_each_momentum(inner: type[QHAdam | ADOPT]) -> None:
    fields = {"lr": 0.02, "decays": (0.8, 0.95), "weights": (0.3, 0.6), "beta2": 0.95, "eps": 1e-3}
    rule, kept = keeping(MTDAO(period=2, momentum_periods=(4, 3), variance_period=6))
    run = cluster(rule, 3, 23, task=NOISY, inner=inner.model_validate(fields), batch_size=2)
    outcome = simulate(run)
    for worker, (x, *moments) in enumerate(reference(run, (2, 4, 3, 6))):
        assert torch.allclose(outcome.params[worker].double(), x, rtol=0, atol=2e-5)
        for name, moment in zip(("exp_avg_0", "exp_avg_1", "exp_avg_sq"), moments, strict=True):
            assert torch.allclose(kept[worker][name].double(), moment, rtol=0, atol=2e-5), name


def test_periods_are_multiples_of_the_parameters_unless_told() -> None:
    adam, two = AdamW(), ADOPT(decays=(0.9, 0.99), weights=(0.5, 0.5))
    assert DESLOC(period=8).periods(adam) == {"": 8, "exp_avg": 24, "exp_avg_sq": 48}
    assert MTDAO(period=8).periods(adam) == {"": 8, "exp_avg": 8, "exp_avg_sq": 8}
    assert MTDAO(period=8, momentum_periods=(16, 32)).periods(two) == {
        "": 8, "exp_avg_0": 16, "exp_avg_1": 32, "exp_avg_sq": 8
    }  # fmt: skip
    assert DESLOC(period=8, momentum_periods=(16,)).periods(two)["exp_avg_1"] == 16
    assert DESLOC(period=8).periods(SGD(lr=0.1)) == {"": 8}


@pytest.mark.parametrize(
    "inner", [AdamW(lr=0.02), ADOPT(lr=0.02), QHAdam(lr=0.02, decays=(0.9, 0.99), weights=(0.5, 0.4))]
)
def test_after_a_common_multiple_all_workers_hold_the_same_bits_of_everything(inner: Inner) -> None:
    rule, kept = keeping(DESLOC(period=2))
    outcome = simulate(cluster(rule, 3, 12, task=NET, inner=inner))
    assert all_equal(outcome)
    for name, state in kept[0].items():
        assert state.any(), name
        assert torch.equal(state, kept[1][name]), name
        assert torch.equal(state, kept[2][name]), name


def test_one_step_short_of_it_the_moments_differ_and_the_parameters_do_not() -> None:
    rule, kept = keeping(DESLOC(period=2))
    outcome = simulate(cluster(rule, 3, 11, task=NET, inner=AdamW(lr=0.02)))
    assert all_equal(outcome)
    assert not torch.equal(kept[0]["exp_avg"], kept[1]["exp_avg"])


@pytest.mark.parametrize("inner", [AdamW(lr=0.02), SGD(lr=0.1, momentum=0.9), SGD(lr=0.1)])
def test_moments_that_are_never_averaged_leave_local_sgd_bit_for_bit(inner: Inner) -> None:
    never = DESLOC(period=4, momentum_periods=(99,), variance_period=99)
    apart = simulate(cluster(never, 3, 14, task=NET, inner=inner))
    local = simulate(cluster(LocalSGD(period=4), 3, 14, task=NET, inner=inner))
    assert torch.equal(replicas(apart), replicas(local))


def test_equal_periods_are_mt_dao_bit_for_bit_and_differ_from_des_loc() -> None:
    inner = QHAdam(lr=0.02)
    runs = [MTDAO(period=3), DESLOC(period=3, momentum_periods=(3,), variance_period=3), DESLOC(period=3)]
    equal, same, other = (replicas(simulate(cluster(rule, 3, 14, task=NET, inner=inner))) for rule in runs)
    assert torch.equal(equal, same)
    assert not torch.equal(equal, other)


@pytest.mark.parametrize("inner", [AdamW(lr=0.02), ADOPT(lr=0.02)])
def test_workers_with_the_same_data_are_as_good_as_one_that_averages_each_step(inner: Inner) -> None:
    same = {"name": "quadratic", "dimension": 12, "spread": 0.0}
    rule = DESLOC(period=1, momentum_periods=(1,), variance_period=1)
    alone, both = (simulate(cluster(rule, workers, 15, task=same, inner=inner)).params[0] for workers in (1, 2))
    assert torch.equal(alone, both)


def test_averaging_the_velocity_each_step_is_the_velocity_of_the_mean_gradient() -> None:
    """Linear averaging commutes with linear momentum, so replicas that are equal stay so without it."""
    inner = SGD(lr=0.1, momentum=0.9)
    often = simulate(cluster(DESLOC(period=1, momentum_periods=(1,)), 3, 15, task=NET, inner=inner))
    never = simulate(cluster(DESLOC(period=1, momentum_periods=(99,)), 3, 15, task=NET, inner=inner))
    assert torch.allclose(often.params[0], never.params[0], atol=2e-6)


def test_moments_drift_no_further_than_clipping_lets_them() -> None:
    """Equal at step 12, then 5 steps of gradients cut to rho: |u_i - u_j| <= 2 rho (1 - beta^5), v with rho^2."""
    rho, beta = 0.1, 0.8
    inner = QHAdam(lr=0.02, decays=(beta,), weights=(1.0,), beta2=0.9, clip_value=rho)
    rule, kept = keeping(DESLOC(period=2))
    simulate(cluster(rule, 3, 17, task=NOISY, inner=inner))
    u = (kept[0]["exp_avg_0"] - kept[1]["exp_avg_0"]).abs().max()
    v = (kept[0]["exp_avg_sq"] - kept[1]["exp_avg_sq"]).abs().max()
    assert 0.5 * rho * (1 - beta**5) < u <= 2 * rho * (1 - beta**5) + 1e-6
    assert 0 < v <= rho**2 * (1 - 0.9**5)


@pytest.mark.parametrize(("fields", "models"), [({}, 1.5), ({"momentum_periods": (2,), "variance_period": 2}, 3.0)])
def test_it_sends_half_of_what_local_adam_sends(fields: dict[str, Any], models: float) -> None:
    """In all-reduces of whole models: 1.5 a period instead of 3, where data parallelism has K_x."""
    task = {"name": "quadratic", "dimension": 40_000, "curvature": (1.0, 1.0)}
    run = cluster(DESLOC(period=2, **fields), 3, 24, task=task, inner=AdamW())
    sent = simulate(run, timing_only=True).left()[0].sent_bytes
    assert sent == pytest.approx(24 / 2 * models * 160_000 * 4 / 3, rel=0.01)


def test_a_lossy_codec_leaves_variances_exact() -> None:
    """Rounded to zero beside larger ones, a small variance would let its coordinate take a step of lr u / eps."""
    task = {**NOISY, "curvature": (1e-3, 2.0), "noise": 0.0}
    rule, kept = keeping(DESLOC(period=1, momentum_periods=(1,), variance_period=1, codec=Int8()))
    outcome = simulate(cluster(rule, 3, 12, task=task, inner=QHAdam(lr=0.02, beta2=0.5)))
    plain = simulate(cluster(DESLOC(period=1), 3, 12, task=task, inner=QHAdam(lr=0.02, beta2=0.5)))
    assert all_equal(outcome)
    assert (kept[0]["exp_avg_sq"] > 0).all()
    assert torch.allclose(outcome.params[0], plain.params[0], atol=0.1)
