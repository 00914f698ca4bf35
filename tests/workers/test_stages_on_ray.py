"""On Ray, too, a model cut into stages trains as the whole one does."""

from __future__ import annotations

import pytest
import torch

from decentral.config import Run, validated
from decentral.journal import Trained
from decentral.outcome import Outcome
from decentral.sim.simulate import simulate
from decentral.workers.launch import train

GPT = {"name": "byte_gpt", "width": 16, "depth": 4, "heads": 2, "context": 16, "eval_windows": 8}


def run_of(stages: int, microbatches: int = 1, order: str = "1f1b") -> Run:
    pipeline = {"stages": stages, "microbatches": microbatches, "order": order} if stages > 1 else {}
    return validated(
        {
            "steps": 100,
            "batch_size": 4,
            "evaluate_every": 0,
            "task": GPT,
            "rule": {"name": "local_sgd", "period": 1},
            "inner": {"name": "adamw", "lr": 1e-3, "clip_norm": 0.5},
            "pipeline": pipeline,
            "fleet": {"workers": [{"count": stages}]},
        },
        "test",
    )


def losses(outcome: Outcome) -> list[float]:
    return [record.loss for record in outcome.records if isinstance(record, Trained) and record.loss is not None]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_on_ray_train_as_the_whole_model_does(stages: int) -> None:
    """Sums over microbatches are rounded otherwise than those over a batch; the first forward pass is not."""
    whole = simulate(run_of(1))
    for microbatches in (1, 2, 4):
        straight, filled = (train(run_of(stages, microbatches, order)) for order in ("1f1b", "gpipe"))
        assert torch.allclose(straight.merged(), whole.merged(), rtol=0, atol=1e-5)
        assert straight.merged().equal(filled.merged())
        assert len(losses(straight)) == 100
        if microbatches == 1:
            assert losses(straight)[0] == losses(filled)[0] == losses(whole)[0]
