"""Single global merging (arXiv 2507.06542): sparse pairs, one complete average at the end, and what it gains."""

from __future__ import annotations

import math

import pytest
import torch
from cluster import STILL, Net, all_equal, apart, cluster, outcomes, quadratic, replicas, rounds, spread, watched
from plain import NOISY, Plain, close
from pydantic import ValidationError
from torch import nn

from decentral.journal import Counterfactual, Synced
from decentral.peer import Peer
from decentral.protocols import SingleMerge
from decentral.replica import held_out, load_params
from decentral.sim.simulate import simulate


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_there_is_exactly_one_complete_merge_and_it_comes_last(rate: float) -> None:
    outcome = simulate(cluster(SingleMerge(period=5, rate=rate), 5, 30))
    assert outcomes(outcome) == [{("committed", (0, 1, 2, 3, 4))}]
    last = [record for record in outcome.records if isinstance(record, Synced)][-5:]
    assert {record.channel for record in last} == {"sync"}
    assert all_equal(outcome)


def test_the_merge_is_the_mean_of_what_the_workers_had() -> None:
    watch = watched(5)
    outcome = simulate(cluster(SingleMerge(period=watch, rate=0.5), 4, 30))
    before = watch.history()[-1]
    assert spread(before) > 0.01
    assert torch.allclose(outcome.params[0], before.mean(dim=0), atol=1e-6)


def test_the_number_of_exchanges_is_binomial() -> None:
    """Each of 4 pairs in each of the first 79 rounds, with probability 0.2: within 4 standard deviations."""
    outcome = simulate(cluster(SingleMerge(period=1), 8, 80, task={**STILL, "dimension": 2}))
    pairs = {(record.round, record.members) for records in rounds(outcome, "pair").values() for record in records}
    tries = 4 * 79
    assert abs(len(pairs) - 0.2 * tries) < 4 * math.sqrt(tries * 0.2 * 0.8)
    assert all(len(members) == 2 for _, members in pairs)
    both = [record for records in rounds(outcome, "pair").values() for record in records]
    assert len(both) == 2 * len(pairs)


def test_pairs_decide_independently() -> None:
    """With R = 1/2 the pairs of a round are not all on or all off together."""
    outcome = simulate(cluster(SingleMerge(period=1, rate=0.5), 8, 20, task={**STILL, "dimension": 2}))
    active = [len(records) // 2 for records in rounds(outcome, "pair").values()]
    assert set(active) & {1, 2, 3}


def test_no_exchange_is_wasted_right_before_the_merge() -> None:
    outcome = simulate(cluster(SingleMerge(period=5, rate=1.0), 4, 30))
    assert list(rounds(outcome, "pair")) == [1, 2, 3, 4, 5]


def test_merging_gains_half_the_trace_of_hessian_times_covariance() -> None:
    """On a quadratic: mean_k L(theta_k) - L(mean theta) = 1/2 Tr(H Gamma), exactly."""
    watch = watched(5)
    run = cluster(apart(SingleMerge(period=watch, rate=0.3)), 6, 25, task={"name": "quadratic", "eval_workers": 6})
    outcome = simulate(run)
    task = quadratic(run)
    curvature, centres = task.curvatures().double(), torch.stack([task.centre(k) for k in range(6)]).double()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (curvature * (x.double() - centres).square()).sum(dim=1).mean()

    before = watch.history()[-1].double()
    deviation = before - before.mean(dim=0)
    gamma = deviation.T @ deviation / len(before)
    gain = torch.stack([loss(theta) for theta in before]).mean() - loss(outcome.params[0])
    assert gain.item() == pytest.approx(0.5 * (curvature.diag() @ gamma).trace().item(), rel=1e-5)
    assert outcome.after["loss"] == pytest.approx(loss(outcome.params[0]).item(), rel=1e-5)


def test_it_equals_the_reference_given_its_pairs() -> None:
    """theta <- after H local steps; the pairs that talk take their mean; at the end everybody takes the mean of all."""
    run = cluster(SingleMerge(period=4, rate=0.5), 5, 28, task=NOISY)
    outcome, plain = simulate(run), Plain(run)
    pairs = {number: {record.members for record in records} for number, records in rounds(outcome, "pair").items()}
    theta = plain.start().repeat(5, 1)
    for number in range(1, 8):
        steps = range(4 * (number - 1), 4 * number)
        theta = torch.stack([plain.sgd(worker, steps, theta[worker], 0.1) for worker in range(5)])
        for pair in pairs.get(number, ()):
            theta[list(pair)] = theta[list(pair)].mean(dim=0)
    assert 3 <= sum(map(len, pairs.values())) < 12  # of two pairs in each of six rounds
    assert close(outcome.params[0], theta.mean(dim=0))


def test_the_spread_shrinks_as_the_rate_says() -> None:
    """Per round 1 - R N / (2 (N - 1)) on the average, where pulls from one random peer shrink it far less."""
    watch = watched()
    simulate(cluster(apart(SingleMerge(period=watch, rate=0.5, merge_at_end=False)), 32, 40, task=STILL))
    values = spread(watch.history())
    ratios = values[1:] / values[:-1]
    # A round's 16 pairs are active or not: its deviation is at most that of their number, relative to the mean.
    error = 0.5 * 32 / 62 * math.sqrt((1 - 0.5) / (0.5 * 16) / len(ratios))
    assert ratios.mean().item() == pytest.approx(1 - 0.5 * 32 / 62, abs=4 * error)


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_it_sends_a_vector_for_each_exchange_and_twice_a_vector_at_the_end(rate: float) -> None:
    """m P R (T - 1) for pairs, of which the last round has none, and 2 (m - 1) P for the all-reduce, headers aside."""
    size, workers = 50_000, 8
    run = cluster(SingleMerge(period=1, rate=rate), workers, 20, task={**STILL, "dimension": size})
    outcome = simulate(run)
    exchanges = sum(len(records) for records in rounds(outcome, "pair").values())
    sent = sum(left.sent_bytes for left in outcome.left())
    assert sent == pytest.approx(4 * size * (exchanges + 2 * (workers - 1)), rel=0.01)


def test_without_exchanges_it_is_a_soup_of_separate_runs() -> None:
    run = cluster(SingleMerge(period=10, rate=0.0), 4, 40)
    task = quadratic(run)
    soup = torch.stack([task.after_sgd(worker, 0.1, 40) for worker in range(4)]).mean(dim=0)
    assert torch.allclose(replicas(simulate(run))[2], soup, atol=1e-6)


# -- windows, looks at the merged model, batch normalisation ----------------------------------------------------------


@pytest.mark.parametrize(("window", "dense"), [((0.5, 0.7), [6, 7]), ((0.0, 0.1), [1]), ((0.8, 1.0), [9, 10])])
def test_every_round_of_the_window_is_complete_and_no_other(window: tuple[float, float], dense: list[int]) -> None:
    rule = SingleMerge(period=3, rate=1.0, window=window, merge_at_end=False)
    watch = watched(3)
    outcome = simulate(cluster(apart(rule.model_copy(update={"period": watch})), 4, 30))
    assert len(rounds(outcome)) == len(dense)
    assert list(rounds(outcome, "pair")) == [number for number in range(1, 11) if number not in dense]
    values = [*spread(watch.history())[1:], spread(replicas(outcome))][:10]
    assert [number for number, value in enumerate(values, 1) if value < 1e-10] == dense


def test_a_window_at_the_very_end_is_the_merge() -> None:
    outcome = simulate(cluster(SingleMerge(period=5, window=(0.8, 1.0)), 3, 50))
    assert len(rounds(outcome)) == 2
    assert all_equal(outcome)
    with pytest.raises(ValidationError, match="must begin before it ends"):
        SingleMerge(window=(0.5, 0.5))


def test_a_look_at_the_merged_model_changes_nothing_but_the_journal() -> None:
    """And it tells what the mean of the replicas is worth on the held-out set."""
    watch = watched(5)
    task = {"name": "quadratic", "eval_workers": 4}
    run = cluster(apart(SingleMerge(period=watch, rate=0.3, evaluate_merged=2)), 4, 30, task=task)
    looked = simulate(run)
    plain = simulate(cluster(apart(SingleMerge(period=5, rate=0.3)), 4, 30, task=task))
    assert torch.equal(replicas(looked), replicas(plain))
    found = [record for record in looked.records if isinstance(record, Counterfactual)]
    assert [(record.worker, record.step, record.members) for record in found] == [
        (0, 10, (0, 1, 2, 3)),
        (0, 20, (0, 1, 2, 3)),
    ]
    means = watch.history().mean(dim=1)
    for record, mean in zip(found, (means[2], means[4]), strict=True):
        assert record.metrics["loss"] == pytest.approx(held_out(run.make_task(), 0, mean)["loss"], rel=1e-5)


class Normed(Net):
    """A network with batch normalisation, on inputs that lie elsewhere for every worker."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

    def batch(self, worker: int, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = super().batch(worker, start, size)
        return inputs + worker, targets


def statistics_of(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """Return mean and variance of what the normalisation gets, from the definition: [2 S]."""
    with torch.no_grad():
        seen = [model[0](inputs) for inputs in batches]  # type: ignore[index]
    means = torch.stack([each.mean(dim=0) for each in seen])
    squares = torch.stack([each.var(dim=0) for each in seen]).mean(dim=0)
    return torch.stack([means.mean(dim=0), squares])


def test_statistics_after_the_merge_are_those_of_all_workers_batches() -> None:
    class Told(SingleMerge):
        async def run(self, peer: Peer) -> None:
            await super().run(peer)
            model = peer.replica.model  # type: ignore[attr-defined]
            told[peer.id] = (peer.statistics, int(model[1].num_batches_tracked), model.training)

    told: dict[int, tuple[torch.Tensor, int, bool]] = {}
    rule = Told(period=4, norm_batches=6)
    run = cluster(rule, 3, 20, task={"name": "test_single_merge:Normed"}, batch_size=8)
    outcome = simulate(run)
    task = run.make_task()
    model = task.model()
    load_params(model, outcome.params[0])
    moments = []
    for worker in range(3):
        batches = [task.batch(worker, 8 * step, 8)[0] for step in range(14, 20)]
        mean, variance = statistics_of(model, batches)
        moments.append(torch.cat([mean, variance + mean.square()]))
    means, squares = torch.stack(moments).mean(dim=0).chunk(2)
    expected = torch.cat([means, squares - means.square()])
    for found, counted, training in told.values():
        assert torch.allclose(found, expected, atol=1e-4)
        assert torch.equal(found, told[0][0])
        assert counted == 20
        assert training


def test_a_look_leaves_the_statistics_alone() -> None:
    class Told(SingleMerge):
        async def run(self, peer: Peer) -> None:
            await super().run(peer)
            told.setdefault(self.evaluate_merged, {})[peer.id] = peer.statistics

    told: dict[int, dict[int, torch.Tensor]] = {}
    for every in (0, 1):
        rule = Told(period=4, rate=0.5, evaluate_merged=every, merge_at_end=False)
        simulate(cluster(rule, 2, 12, task={"name": "test_single_merge:Normed"}, batch_size=8))
    assert all(torch.equal(told[0][worker], told[1][worker]) for worker in range(2))
