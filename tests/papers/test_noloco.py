"""NoLoCo (arXiv 2506.10911): the outer step, its consensus dynamics in closed form, and what it falls back to."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cluster import STILL, apart, cluster, crash, quadratic, replicas, rounds, spread, start_of, watched
from numpy.typing import NDArray
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Trained
from decentral.outcome import Outcome
from decentral.protocols import DiLoCo, NoLoCo, OuterSGD
from decentral.protocols.noloco import stability_bound
from decentral.protocols.topology import RandomGroups
from decentral.sim.simulate import simulate


def groups_of(outcome: Outcome) -> list[set[tuple[int, ...]]]:
    """Return the groups of every round, as the journal has them."""
    return [{record.members for record in records} for records in rounds(outcome, "fast").values()]


def reference(run: Run, steps: int, starts: Tensor, matchings: list[set[tuple[int, ...]]]) -> Tensor:
    """Equations 1 to 3 in float64, (Delta, phi) exchanged as in the paper: phi of all workers, [workers, P]."""
    rule, task, lr = run.rule, quadratic(run), run.inner.lr
    assert isinstance(rule, NoLoCo)
    gamma = rule.beta if rule.gamma is None else rule.gamma
    curvature = task.curvatures().double()
    centres = torch.stack([task.centre(worker) for worker in range(len(starts))]).double()
    phi, velocity = starts.double(), torch.zeros_like(starts).double()
    for groups in matchings:
        theta = centres + (1 - lr * curvature) ** steps * (phi - centres)
        delta = theta - phi
        new_phi = phi.clone()
        for group in groups:
            rows = list(group)
            mean_delta, mean_phi = delta[rows].mean(dim=0), phi[rows].mean(dim=0)
            for i in rows:
                velocity[i] = rule.alpha * velocity[i] + rule.beta * mean_delta - gamma * (phi[i] - mean_phi)
                new_phi[i] = phi[i] + velocity[i]
        phi = new_phi
    return phi


@pytest.mark.parametrize(
    ("workers", "fields"),
    [
        (2, {}),
        (4, {}),
        (5, {}),
        (4, {"gamma": 0.3}),
        (5, {"gamma": 1.1, "alpha": 0.3, "beta": 0.4}),
        (6, {"group": 3}),
        (7, {"group": 3, "gamma": 0.5}),
    ],
)
def test_noloco_equals_the_equations(workers: int, fields: dict[str, float]) -> None:
    """With gamma = beta only theta travels; the reference exchanges Delta and phi always."""
    rule = apart(NoLoCo(period=4, **fields))
    run = cluster(rule, workers, steps=28)
    outcome = simulate(run)
    matchings = groups_of(outcome)
    assert len(matchings) == 7
    assert all(sorted(itertools.chain(*groups)) == list(range(workers)) for groups in matchings)
    starts = torch.stack([start_of(worker, 16) for worker in range(workers)])
    expected = reference(run, 4, starts, matchings)
    assert torch.allclose(replicas(outcome).double(), expected, rtol=0, atol=5e-6)


def test_gamma_equal_to_beta_sends_half_as_much() -> None:
    def sent(gamma: float | None) -> int:
        outcome = simulate(cluster(NoLoCo(period=1, gamma=gamma), 2, 4, task={"name": "quadratic", "dimension": 5000}))
        return outcome.left()[0].sent_bytes

    assert sent(0.6) == pytest.approx(2 * sent(None), rel=0.01)


# -- no gradients: the consensus term alone ---------------------------------------------------------------------------


def spreads(workers: int, steps: int, *, seed: int = 0, dimension: int = 16, **fields: float) -> Tensor:
    """Return the squared spread after 0, 1, ... `steps` rounds relative to the first: [steps + 1]."""
    watch = watched()
    task = {**STILL, "dimension": dimension}
    simulate(cluster(apart(NoLoCo(period=watch, **fields), seed), workers, steps, task=task, seed=seed))
    values = spread(watch.history())
    return values / values[0]


def test_two_replicas_follow_the_closed_form() -> None:
    """d' = d + e', e' = alpha e - gamma d, from e = 0."""
    expected = [1, 0.09, 0.0676, 0.1282, 0.0245, 0.0029, 0.0147, 0.0049]
    found = spreads(2, 7, alpha=0.5, beta=0.7).tolist()
    assert [round(value, 4) for value in found] == expected


@pytest.mark.parametrize(("gamma", "factor"), [(0.3, 0.49), (0.7, 0.09), (1.5, 0.25)])
def test_without_momentum_the_difference_shrinks_by_one_minus_gamma(gamma: float, factor: float) -> None:
    assert spreads(2, 1, alpha=0.0, gamma=gamma)[1].item() == pytest.approx(factor, rel=1e-5)


def test_gamma_one_makes_a_pair_equal_to_its_mean() -> None:
    outcome = simulate(cluster(apart(NoLoCo(period=1, alpha=0.0, beta=1.0)), 2, 1, task=STILL))
    mean = (start_of(0, 16) + start_of(1, 16)) / 2
    assert torch.allclose(replicas(outcome), mean.expand(2, 16), rtol=0, atol=1e-6)


def moments(alpha: float, gamma: float, kappa: float) -> NDArray[np.float64]:
    """Return the map of (E sum|x|^2, E sum x.v, E sum|v|^2) over one round without gradients, [3, 3]."""
    v = np.array([gamma**2 * kappa, -2 * alpha * gamma * kappa, alpha**2])
    c = np.array([-gamma * kappa, alpha, 0]) + v
    s = np.array([1 - 2 * gamma * kappa, 2 * alpha, 0]) + v
    return np.stack([s, c, v])


def kappa_by_counting(workers: int, group: int) -> float:
    """Return E sum|x - group mean|^2 / sum|x|^2 for centred x, over all ways to deal workers into groups."""
    count = -(-workers // group)
    sizes = [len(range(index, workers, count)) for index in range(count)]
    x = np.eye(workers)[0] - 1 / workers
    total, orders = 0.0, 0
    for order in itertools.permutations(range(workers)):
        place = 0
        for size in sizes:
            members = x[list(order[place : place + size])]
            total += float(((members - members.mean()) ** 2).sum())
            place += size
        orders += 1
    return total / orders / float((x**2).sum())


@pytest.mark.parametrize(("workers", "group", "alpha", "gamma"), [(8, 2, 0.5, 0.7), (5, 2, 0.5, 0.7), (7, 3, 0.3, 0.9)])
def test_expected_spread(workers: int, group: int, alpha: float, gamma: float) -> None:
    """Monte Carlo over 25 to 40 seeds: within 4 standard errors of the moments' closed form, round by round."""
    fields = {"alpha": alpha, "gamma": gamma, "group": group}
    runs = torch.stack([spreads(workers, 3, seed=seed, dimension=64, **fields) for seed in range(200 // workers)])
    errors = runs.std(dim=0) / math.sqrt(len(runs))
    kappa = kappa_by_counting(workers, group)
    state = np.array([1.0, 0.0, 0.0])
    for round_ in range(1, 4):
        state = moments(alpha, gamma, kappa) @ state
        assert errors[round_] < 0.1 * state[0]
        assert abs(runs[:, round_].mean().item() - state[0]) < 4 * errors[round_]


@pytest.mark.parametrize(
    ("alpha", "gamma", "factor"), [(0.0, 1.0, 3 / 7), (0.0, 0.7, 1 - 0.7 * 0.65 * 8 / 7), (0.5, 0.7, 0.48)]
)
def test_one_round_of_eight_replicas(alpha: float, gamma: float, factor: float) -> None:
    """From normal starting points each coordinate is a sample: 20,000 of them, a standard error below 0.1 %."""
    found = spreads(8, 1, dimension=20_000, alpha=alpha, gamma=gamma)[1].item()
    assert found == pytest.approx(factor, rel=0.01)


def test_the_closed_form_gives_the_specs_numbers() -> None:
    def sequence(alpha: float, gamma: float, workers: int) -> list[float]:
        state, found = np.array([1.0, 0.0, 0.0]), [1.0]
        for _ in range(8):
            state = moments(alpha, gamma, workers / (2 * (workers - 1))) @ state
            found.append(state[0])
        return found

    assert np.round(sequence(0.5, 0.7, 8), 3).tolist() == [1, 0.480, 0.228, 0.173, 0.136, 0.091, 0.057, 0.037, 0.026]
    assert sequence(0.0, 1.0, 8)[1] == pytest.approx(3 / 7)


# -- stability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "bounds"),
    [
        (0.5, {2: 3.0, 4: 1.8, 16: 1.55, 10**9: 1.5}),
        (0.9, {4: 0.54, 16: 0.40, 10**9: 0.38}),
        (0.3, {2: 2.6, 4: 2.02, 16: 1.86, 10**9: 1.82}),
        (0.0, {2: 2.0, 5: 2.0, 64: 2.0}),
    ],
)
def test_stability_bounds_of_the_spec(alpha: float, bounds: dict[int, float]) -> None:
    for workers, bound in bounds.items():
        assert stability_bound(alpha, 2, workers) == pytest.approx(bound, abs=0.006)


def test_groups_of_everybody_are_as_stable_as_diloco() -> None:
    assert stability_bound(0.5, 8, 8) == stability_bound(0.5, 99, 8) == pytest.approx(2 * 1.5)


@pytest.mark.parametrize(("workers", "group"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2), (7, 3), (6, 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_the_bound_is_where_the_moments_begin_to_grow(workers: int, group: int, alpha: float) -> None:
    """Groups that do not divide the workers too: the odd one out feels no pull in that round."""
    bound = stability_bound(alpha, group, workers)
    kappa = kappa_by_counting(workers, group)

    def radius(gamma: float) -> float:
        return float(np.abs(np.linalg.eigvals(moments(alpha, gamma, kappa))).max())

    assert radius(bound * 0.999) < 1 < radius(bound * 1.001)


def test_above_the_bound_three_replicas_drift_apart() -> None:
    """For N = 3 a matching leaves one alone: with alpha 0.9 the bound is 0.38, not the 0.69 of whole pairs."""
    assert stability_bound(0.9, 2, 3) == pytest.approx(0.38)
    grown = torch.stack([spreads(3, 40, seed=seed, alpha=0.9, gamma=0.6)[-10:].mean() for seed in range(4)])
    shrunk = torch.stack([spreads(3, 40, seed=seed, alpha=0.9, gamma=0.2)[-10:].mean() for seed in range(4)])
    assert grown.mean() > 1
    assert shrunk.mean() < 0.2


def test_an_unstable_gamma_is_refused_with_the_interval() -> None:
    with pytest.raises(ConfigError, match=r"rule\.gamma: 1\.9 .* 4 workers it must be in \(0, 1\.8\)"):
        NoLoCo(gamma=1.9).check(4)
    with pytest.raises(ConfigError, match=r"rule\.gamma"):
        NoLoCo(alpha=0.9).check(4)  # gamma is beta = 0.7, the bound 0.543
    with pytest.raises(ConfigError, match="needs at least 2 workers"):
        NoLoCo().check(1)
    NoLoCo(gamma=1.79).check(4)
    NoLoCo(alpha=0.9, gamma=0.5).check(4)


# -- with gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [None, 0.4])
@pytest.mark.parametrize("workers", [4, 5])
def test_the_mean_replica_follows_its_two_term_recursion(workers: int, gamma: float | None) -> None:
    """m' = (1 + alpha - beta (1 - b)) m - alpha m_before around the optimum, b = (1 - w lambda)^H."""
    watch = watched(3)
    run = cluster(apart(NoLoCo(period=watch, gamma=gamma)), workers, steps=3 * 12)
    simulate(run)
    task = quadratic(run)
    means = watch.history().double().mean(dim=1) - task.optimum(workers).double()
    b = (1 - 0.1 * task.curvatures().double()) ** 3
    # Pairs share their Delta, so its sum over all workers is what it would be alone; the pull sums to zero.
    first, second = means[0], means[0] - 0.7 * (1 - b) * means[0]
    expected = [first, second]
    for _ in range(11):
        expected.append((1 + 0.5 - 0.7 * (1 - b)) * expected[-1] - 0.5 * expected[-2])
    assert torch.allclose(means, torch.stack(expected), rtol=0, atol=5e-6)


def test_a_group_of_everybody_is_diloco_with_heavy_ball() -> None:
    noloco = simulate(cluster(NoLoCo(period=5, group=4), 4, 30))
    diloco = simulate(cluster(DiLoCo(period=5, outer=OuterSGD(lr=0.7, momentum=0.5)), 4, 30))
    assert torch.allclose(replicas(noloco), replicas(diloco), atol=2e-6)


def test_a_worker_left_alone_is_lookahead_with_momentum() -> None:
    run = cluster(NoLoCo(period=5), 2, 30, events=[crash(0.01, 1)], detection_s=0.0)
    outcome = simulate(run)
    task = quadratic(run)
    slow, velocity = torch.full((16,), task.start), torch.zeros(16)
    for _ in range(6):
        velocity = 0.5 * velocity + 0.7 * (task.after_sgd(0, 0.1, 5, x0=slow) - slow)
        slow = slow + velocity
    assert list(outcome.params) == [0]
    assert torch.allclose(outcome.params[0], slow, atol=2e-6)


def test_a_group_that_fails_falls_back_to_a_group_of_one() -> None:
    """The partner dies during the exchange: the survivor's step is its own, no gradient is lost."""
    run = cluster(NoLoCo(period=5), 2, 5, events=[crash(0.26, 1)], detection_s=0.5)
    outcome = simulate(run)
    task = quadratic(run)
    start = torch.full((16,), task.start)
    alone = start + 0.7 * (task.after_sgd(0, 0.1, 5) - start)
    assert [record.outcome for record in rounds(outcome, "fast")[1]] == ["skipped"]
    assert torch.allclose(outcome.params[0], alone, atol=1e-6)


def test_an_odd_worker_out_takes_its_own_step() -> None:
    links = [RandomGroups().size, *(len(group) for group in groups_of(simulate(cluster(NoLoCo(period=1), 5, 1)))[0])]
    assert sorted(links[1:]) == [1, 2, 2]


def test_phi_travels_while_the_workers_train() -> None:
    """A vector takes 0.2 s, a phase 0.5 s: with phi ahead a round waits for one vector and verdicts, as without phi."""

    def waited(gamma: float | None) -> list[float]:
        task = {"name": "quadratic", "dimension": 25_000}
        run = cluster(NoLoCo(period=10, gamma=gamma), 2, 40, task=task, up_bps=4e6, down_bps=4e6)
        times = [record.time_s for record in simulate(run).records if isinstance(record, Trained) and not record.worker]
        return [after - before - 0.5 for before, after in itertools.pairwise(times)]

    assert waited(0.5) == pytest.approx(waited(None), rel=0.02)


def test_who_does_not_answer_within_the_patience_leaves_two_groups_of_one() -> None:
    """The slow worker comes to a round that is over, hears so, and takes its own step at once."""
    run = cluster(NoLoCo(period=5, gamma=0.5), 2, 10, speeds=[1, 0.1], patience_s=0.3)
    outcome = simulate(run)
    task = quadratic(run)
    for worker in (0, 1):
        slow, velocity = torch.full((16,), task.start), torch.zeros(16)
        for _ in range(2):
            velocity = 0.5 * velocity + 0.7 * (task.after_sgd(worker, 0.1, 5, x0=slow) - slow)
            slow = slow + velocity
        assert torch.allclose(outcome.params[worker], slow, atol=1e-6)
    said = [record for records in rounds(outcome, "fast").values() for record in records]
    assert {record.outcome for record in said if len(record.members) == 2} == {"skipped"}
    ends = {record.worker: record.time_s for record in outcome.left()}
    assert ends[0] == pytest.approx(2 * (0.25 + 0.3), abs=0.05)
    assert ends[1] == pytest.approx(2 * 2.5, abs=0.1)
