"""Population based training (arXiv 1711.09846): against a reference, and what no draw of chance may change."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, outcomes, replicas
from plain import NOISY, Plain, close
from pydantic import ValidationError
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.inner import SGD, AdamW
from decentral.journal import Counterfactual
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import PBT, DiLoCo, LocalSGD, Median, Nesterov
from decentral.protocols.population import donors, drawn, explored
from decentral.replica import seed_of
from decentral.sim.simulate import simulate
from decentral.wire import Packet, Tag

BOUNDS = (0.01, 0.3)
TUNED: dict[str, Any] = {"period": 2, "ready": 5, "lr": BOUNDS}


# -- what is decided at a comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "quantile", "copies"), [(8, 0.25, 2), (5, 0.25, 2), (3, 0.5, 1), (2, 0.25, 1)])
def test_the_worst_copy_the_best_and_nobody_is_both(groups: int, quantile: float, copies: int) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        scores = {group: chance.random() for group in range(groups)}
        ranked = sorted(scores, key=lambda group: scores[group])
        found = donors(scores, quantile, chance)
        assert sorted(found) == sorted(ranked[-copies:])
        assert set(found.values()) <= set(ranked[:copies])


def test_with_one_score_there_is_nobody_to_copy() -> None:
    assert donors({3: 1.0}, 0.5, random.Random(0)) == donors({}, 0.5, random.Random(0)) == {}


def test_rates_are_varied_by_one_of_the_factors_within_their_bounds_or_drawn_anew() -> None:
    chance = random.Random(0)
    near = [explored([0.1, 0.7], [BOUNDS, None], chance, 0.0, (0.8, 1.2)) for _ in range(200)]
    assert {round(rate, 9) for rate, _ in near} == {0.08, 0.12}
    assert {rate for _, rate in near} == {0.7}
    assert explored([0.29], [BOUNDS], chance, 0.0, (1.2, 1.2)) == [0.3]
    assert explored([0.011], [BOUNDS], chance, 0.0, (0.8, 0.8)) == [0.01]
    anew = [explored([0.1], [BOUNDS], chance, 1.0, (0.8, 1.2))[0] for _ in range(2000)]
    assert all(0.01 <= rate <= 0.3 for rate in anew)
    middle = math.sqrt(0.01 * 0.3)  # of a uniform logarithm
    assert sum(rate < middle for rate in anew) / 2000 == pytest.approx(0.5, abs=0.05)


# -- the rule ---------------------------------------------------------------------------------------------------------


def reference(run: Run, rule: PBT, groups: list[list[int]]) -> tuple[Tensor, list[list[float]]]:
    """The rule on plain tensors, with plain SGD and averages inside groups: (the winner, all groups' rates by time)."""
    plain = Plain(run)
    centres = [plain.task.centre(worker).double() for worker in range(plain.task.eval_workers)]
    curvature, models = plain.task.curvatures().double(), [plain.start() for _ in groups]
    low, high = (math.log(bound) for bound in BOUNDS)
    chance = random.Random(seed_of(run.seed, "pbt", 0))
    rates = [[run.inner.lr, *(math.exp(chance.uniform(low, high)) for _ in groups[1:])]]
    edges = sorted({*range(0, run.steps, rule.ready), run.steps})
    for number, (first, last) in enumerate(itertools.pairwise(edges), start=1):
        for index, group in enumerate(groups):
            for begin in range(first, last, 2):
                steps = range(begin, min(begin + 2, last))
                ends = [plain.sgd(worker, steps, models[index], rates[-1][index]) for worker in group]
                models[index] = torch.stack(ends).mean(dim=0)
        losses = [float(sum((curvature * (x - c) ** 2).sum() / 2 for c in centres)) for x in models]
        order = sorted(range(len(groups)), key=losses.__getitem__)
        if last == run.steps:
            return models[order[0]], rates
        chance, new = random.Random(seed_of(run.seed, "pbt", number)), list(rates[-1])
        for taker, donor in [(taker, chance.choice(order[:1])) for taker in order[-1:]]:
            models[taker], rate = models[donor], rates[-1][donor]
            anew = chance.random() < rule.resample
            drawn = math.exp(chance.uniform(low, high)) if anew else rate * chance.choice((0.8, 1.2))
            new[taker] = min(max(drawn, BOUNDS[0]), BOUNDS[1])
        rates.append(new)
    raise AssertionError


@pytest.mark.parametrize("resample", [0.0, 0.5])
@pytest.mark.parametrize(("workers", "groups"), [(4, [[0], [1], [2], [3]]), (6, [[0, 1], [2, 3], [4, 5]])])
def test_pbt_equals_the_reference(workers: int, groups: list[list[int]], resample: float) -> None:
    rule = PBT(**TUNED, groups=len(groups), resample=resample)
    run = cluster(rule, workers, 32, task=NOISY, inner=SGD(lr=0.02))
    outcome = simulate(run)
    winner, rates = reference(run, rule, groups)
    assert all_equal(outcome)
    assert close(outcome.params[0], winner)
    assert len({tuple(at) for at in rates}) == 7  # it was varied at every comparison
    assert outcome.slots[0]["rates"].view(-1, 2)[:, 0].tolist() == pytest.approx(rates[-1], rel=1e-5)


def test_one_group_is_the_rule_inside_it_bit_for_bit() -> None:
    alone = simulate(cluster(PBT(period=4, groups=1, lr=None), 3, 14, task=NET))
    assert torch.equal(replicas(alone), replicas(simulate(cluster(LocalSGD(period=4), 3, 14, task=NET))))
    outer = simulate(cluster(PBT(period=4, groups=1, lr=None, outer=Nesterov()), 3, 14, task=NET))
    assert torch.equal(replicas(outer), replicas(simulate(cluster(DiLoCo(period=4), 3, 14, task=NET))))


def test_every_worker_knows_all_rates_and_they_stay_within_bounds() -> None:
    rule = PBT(period=1, ready=2, groups=5, lr=(0.05, 0.1), outer_lr=(0.5, 1.0), factors=(0.5, 2.0))
    for steps in (2, 8, 30):
        slots = simulate(cluster(rule, 5, steps, task=NOISY, inner=SGD(lr=1.0))).slots
        rates = slots[0]["rates"].view(-1, 2)
        assert all(torch.equal(slots[worker]["rates"], slots[0]["rates"]) for worker in slots)
        assert ((rates >= torch.tensor([0.05, 0.5]) - 1e-7) & (rates <= torch.tensor([0.1, 1.0]) + 1e-7)).all()


def looks(outcome: Outcome, step: int) -> dict[int, float]:
    """Return the losses that workers found at a comparison."""
    found = [record for record in outcome.records if isinstance(record, Counterfactual) and record.step == step]
    return {record.worker: record.metrics["loss"] for record in found}


def test_only_the_worst_group_is_changed_and_it_goes_on_as_its_donor_would() -> None:
    """Single workers on equal bowls: who has copied steps on as its donor does, inner state and all."""
    task, inner = {"name": "quadratic", "spread": 0.0}, AdamW(lr=0.1)
    rule = PBT(period=1, ready=6, groups=4, lr=BOUNDS, resample=0.0, factors=(0.999, 0.999))
    outcome = simulate(cluster(rule, 4, 7, task=task, inner=inner))
    before, after = looks(outcome, 6), looks(outcome, 7)
    best, worst = min(before, key=before.__getitem__), max(before, key=before.__getitem__)
    chance = random.Random(seed_of(0, "pbt", 0))
    rates = [0.1, *(drawn(BOUNDS, chance) for _ in range(3))]
    for worker in range(4):
        alone = cluster(LocalSGD(period=1), 1, 7, task=task, inner=AdamW(lr=rates[best if worker == worst else worker]))
        assert after[worker] == pytest.approx(simulate(alone).after["loss"], rel=2e-3 if worker == worst else 1e-5)
    assert after[worst] < 0.9 * before[worst]


def test_the_rates_can_be_told_from_the_journal_and_the_seed() -> None:
    outcome = simulate(cluster(PBT(period=1, ready=3, groups=3, lr=BOUNDS), 3, 13, task=NOISY))
    chance = random.Random(seed_of(0, "pbt", 0))
    rates = [[0.1], *([drawn(BOUNDS, chance)] for _ in range(2))]
    for number, step in enumerate((3, 6, 9, 12), start=1):
        chance = random.Random(seed_of(0, "pbt", number))
        for taker, donor in donors(looks(outcome, step), 0.25, chance).items():
            rates[taker] = explored(rates[donor], [BOUNDS], chance, 0.25, (0.8, 1.2))
    assert outcome.slots[0]["rates"].view(-1, 2)[:, :1].tolist() == [pytest.approx(rate, rel=1e-5) for rate in rates]


def test_groups_that_copy_and_vary_get_further_than_the_same_groups_apart() -> None:
    """All rates within bounds are too small, and the first group's is the smallest."""
    task, inner = {"name": "quadratic", "spread": 0.0, "curvature": (0.05, 1.0)}, SGD(lr=0.002)
    fields: dict[str, Any] = {"period": 2, "groups": 4, "lr": (0.001, 0.05)}
    still = simulate(cluster(LocalSGD(period=2), 4, 100, task=task, inner=inner)).after["loss"]
    apart = simulate(cluster(PBT(**fields, ready=1000), 4, 100, task=task, inner=inner)).after["loss"]
    tuned = simulate(cluster(PBT(**fields, ready=5), 4, 100, task=task, inner=inner)).after["loss"]
    assert tuned < 0.6 * apart < 0.6 * still


@pytest.mark.parametrize("at_s", [0.35, 1.05, 1.55])
def test_who_dies_costs_its_group_a_worker_and_the_others_nothing(at_s: float) -> None:
    rule = PBT(period=2, ready=4, groups=2, lr=BOUNDS)
    for worker in (0, 3):
        outcome = simulate(cluster(rule, 4, 20, task=NOISY, events=[crash(at_s, worker)], patience_s=5.0))
        assert sorted(outcome.params) == sorted({0, 1, 2, 3} - {worker})
        assert all_equal(outcome)
        assert {kind for each in outcomes(outcome, "scores") for kind, _ in each} <= {"committed", "degraded"}


def test_a_group_that_dies_out_leaves_the_others_to_go_on() -> None:
    rule = PBT(period=2, ready=4, groups=3, lr=BOUNDS)
    outcome = simulate(cluster(rule, 3, 20, task=NOISY, events=[crash(0.9, 1)], patience_s=5.0))
    assert sorted(outcome.params) == [0, 2]
    assert all_equal(outcome)


def test_a_copy_is_the_model_and_the_running_means_and_nothing_goes_the_other_way() -> None:
    """One comparison of two single workers, then the end: bytes beyond what scores cost come from the donor alone."""
    rule = PBT(period=4, ready=4, groups=2, lr=(0.01, 0.2))
    size = 5000
    task = {"name": "quadratic", "dimension": size, "spread": 0.0}
    left = simulate(cluster(rule, 2, 6, task=task, inner=AdamW(lr=0.05))).left()
    models = sorted(round(record.sent_bytes / (4 * size)) for record in left)
    assert models in ([0, 4], [1, 3])  # model and two means, and in the end the winner's model


def test_a_copy_that_does_not_reach_all_of_a_group_is_taken_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a copy comes to workers 1 and 3: each group goes on from its own model, and stays together."""
    send = Peer.send

    def lossy(peer: Peer, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None]:
        lost = tag.channel == "copy" and to in (1, 3)
        return asyncio.get_running_loop().create_future() if lost else send(peer, to, tag, packet)

    monkeypatch.setattr(Peer, "send", lossy)
    rule = PBT(period=1, ready=4, groups=2, lr=None)
    rows = replicas(simulate(cluster(rule, 4, 12, task=NOISY, patience_s=5.0)))
    monkeypatch.undo()
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    pair = replicas(simulate(cluster(LocalSGD(period=1), 2, 12, task=NOISY)))
    assert torch.equal(rows[:2], pair)
    assert not torch.equal(rows[0], rows[2])


def test_what_cannot_work_is_refused() -> None:
    median = PBT(groups=2, merge=Median(), all_reduce="gather")
    median.check(6)
    with pytest.raises(ConfigError, match=r"rule\.merge"):  # three would do, but the smaller group has two
        median.check(5)
    with pytest.raises(ConfigError, match=r"rule\.groups: 4 groups need as many workers, the fleet has 3"):
        PBT().check(3)
    with pytest.raises(ValidationError, match="the smallest rate comes first"):
        PBT(lr=(0.1, 0.01))
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.5"):
        PBT(quantile=0.6)
