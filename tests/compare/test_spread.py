"""How far replicas are apart: closed forms of both measures, and what runs come to."""

from __future__ import annotations

import math

import pytest
import torch
from cluster import NET, STILL, apart, cluster, start_of
from torch import Tensor, nn

from decentral.compare.spread import Spread, distance, divergence, spread_of
from decentral.config import Run
from decentral.pipeline import Pipeline
from decentral.protocols import DDP, LocalSGD
from decentral.protocols.schedule import Every
from decentral.sim.simulate import simulate
from decentral.tasks import ByteGPT


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_a_pair_is_half_its_distance_from_the_mean() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, -2.0])
    assert distance([a, b]) == pytest.approx(2 / math.sqrt(5))
    assert distance([a, a, a]) == 0.0
    assert distance([a, -a]) == math.inf


def test_certain_predictions_that_all_differ_are_apart_by_the_logarithm_of_their_number() -> None:
    certain = torch.eye(3).log()
    assert divergence(certain[None, row] for row in range(3)) == pytest.approx(math.log(3))
    assert divergence([certain, certain]) == 0.0


def test_the_divergence_of_two_coins_by_hand() -> None:
    found = divergence([logs([0.9, 0.1], [0.5, 0.5]), logs([0.1, 0.9], [0.5, 0.5])])
    of_first = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)  # their mean is a fair coin
    assert found == pytest.approx(of_first / 2, rel=1e-6)


def test_whoever_predicts_nothing_has_no_divergence() -> None:
    assert divergence([logs([1.0]), None]) is None


def test_replicas_of_gradient_averaging_are_equal() -> None:
    run = cluster(DDP(), 3, task=NET)
    assert spread_of(run, run.make_task(), simulate(run)) == Spread(0.0, None)


def test_the_distance_of_a_run_is_that_of_its_workers() -> None:
    """Workers begin apart, do not move, and never talk."""
    run = cluster(apart(LocalSGD(period=Every(period=100))), 4, steps=1, task=STILL)
    run = run.model_copy(update={"rule": apart(Still())})
    starts = torch.stack([start_of(worker, 16) for worker in range(4)]).double()
    expected = (starts - starts.mean(0)).square().sum(1).mean().sqrt() / starts.mean(0).norm()
    found = spread_of(run, run.make_task(), simulate(run))
    assert found.distance == pytest.approx(float(expected), rel=1e-6)


class Still(LocalSGD):
    """Never averages."""

    async def run(self, peer: object) -> None:
        await peer.train(1)  # type: ignore[attr-defined]


def test_language_models_predict_their_held_out_bytes() -> None:
    task = ByteGPT(width=8, depth=1, heads=1, context=8, eval_windows=40)
    torch.manual_seed(0)
    model = task.model()
    with torch.no_grad():
        found = task.predictions(model)
        assert found.shape == (40 * 8, 256)
        assert torch.allclose(found.exp().sum(-1), torch.ones(320))
        text = task._corpus().heldout
        places = torch.linspace(0, len(text) - 9, 40, dtype=torch.float64).long()
        targets = torch.stack([text[place + 1 : place + 9] for place in places]).long().flatten()
        assert nn.functional.nll_loss(found, targets).item() == pytest.approx(task.evaluate(model)["loss"], rel=1e-5)


def test_replicas_of_several_stages_are_put_together() -> None:
    run = cluster(LocalSGD(period=Every(period=2)), 4, 5, task={"name": "layer_stack", "layers": 2}, batch_size=2)
    run = Run(**{**run.to_fields(), "pipeline": Pipeline(stages=2, microbatches=1)})
    outcome = simulate(run)
    rows = [outcome.assemble([outcome.params[2 * row], outcome.params[2 * row + 1]]) for row in range(2)]
    assert spread_of(run, run.make_task(), outcome).distance == pytest.approx(distance(rows))
    assert len(rows[0]) == sum(len(outcome.params[worker]) for worker in (0, 1))
