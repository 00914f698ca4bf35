"""Distances of replicas, known from sketches alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from decentral.config import Run, validated
from decentral.journal import Sketched
from decentral.sim.simulate import simulate
from decentral.sketch import CHUNK, NUMBERS, Sketches, distance, sketch_of


def told(replicas: list[Tensor]) -> Sketches:
    sketches = Sketches()
    for replica in replicas:
        sketches.add(sketch_of(replica))
    return sketches


def spread_of(replicas: list[Tensor]) -> float:
    mean = torch.stack(replicas).double().mean(dim=0)
    squares = [float((each - mean).square().sum()) for each in replicas]
    return math.sqrt(sum(squares) / len(replicas)) / float(mean.norm())


@pytest.mark.parametrize("numel", [NUMBERS, 1000, 100_003, 2 * CHUNK + 5])
def test_a_distance_is_that_of_the_parameters_within_the_stated_error(numel: int) -> None:
    """The estimate's standard error is 1 / sqrt(2 NUMBERS) of a distance, and of the norm that it is divided by."""
    generator = torch.Generator().manual_seed(numel)
    base = torch.randn(numel, generator=generator)
    replicas = [base + 1e-3 * torch.randn(numel, generator=generator) for _ in range(8)]
    assert distance([told(replicas)]) == pytest.approx(spread_of(replicas), rel=4 / math.sqrt(2 * NUMBERS))


def test_estimates_have_no_bias() -> None:
    """The mean over many pairs comes to the truth, ten times as closely as one of them does."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(400):
        one, other = torch.randn(2, 4096, generator=generator)
        told_square = told([one, other]).variance
        ratios.append(told_square / (float((one - other).double().square().sum()) / 4))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=4 * math.sqrt(2 / NUMBERS / len(ratios)))


def test_equal_replicas_are_exactly_equal_and_stages_add_up() -> None:
    one, other = torch.ones(1000), torch.zeros(1000)
    assert distance([told([one, one, one])]) == 0.0
    alone = distance([told([one, other])])
    assert distance([told([one, other]), told([one, other])]) == pytest.approx(alone)
    assert distance([told([one, other]), told([one, one])]) < alone
    assert distance([told([other, other])]) == math.inf
    assert not math.isfinite(distance([told([one, one * math.nan])]))


def run_of(rule: dict[str, object], **fields: object) -> Run:
    return validated(
        {
            "steps": 40,
            "evaluate_every": 10,
            "task": {"name": "quadratic", "dimension": 512, "spread": 2.0},
            "inner": {"name": "sgd", "lr": 0.05},
            "rule": rule,
            "fleet": {"workers": [{"count": 4}]},
            **fields,
        },
        "test",
    )


def sketches(run: Run) -> dict[int, Sketches]:
    found: dict[int, Sketches] = {}
    for record in simulate(run).records:
        if isinstance(record, Sketched):
            found.setdefault(record.number, Sketches()).add(record.sketch)
    return found


def test_replicas_that_part_are_seen_before_they_meet() -> None:
    found = sketches(run_of({"name": "local_sgd", "period": 10}))
    assert sorted(found) == [1, 2, 3, 4]
    assert all(each.count == 4 and distance([each]) > 0.01 for each in found.values())


def test_replicas_of_one_gradient_never_part() -> None:
    found = sketches(run_of({"name": "ddp"}))
    assert sorted(found) == [1, 2, 3, 4]
    assert all(distance([each]) == 0.0 for each in found.values())


def test_nobody_evaluates_nobody_sketches() -> None:
    assert sketches(run_of({"name": "local_sgd", "period": 10}, evaluate_every=0)) == {}
