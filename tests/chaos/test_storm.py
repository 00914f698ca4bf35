"""Workers and coordinators that are killed and frozen all the time, over real sockets and in real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decentral.config import Run, validated
from decentral.replica import held_out
from decentral.sim.simulate import simulate
from decentral.verify import verify
from tests.chaos.agreement import require_agreement
from tests.chaos.storm import Storm
from tests.chaos.witness import sights

WORKERS = 5
STEP_S = 0.005
PERIOD = 4
QUICK_STEPS, LONG_STEPS = 300, 4000
WITNESSED = "tests.chaos.witness:Witnessed"
TOPK = {
    "name": WITNESSED + "DiLoCo",
    "period": PERIOD,
    "codec": {"name": "error_feedback", "codec": "topk"},
    "all_reduce": "gather",
}
EQUAL: dict[str, dict[str, Any]] = {
    "ddp": {"name": WITNESSED + "DDP"},
    "diloco": {"name": WITNESSED + "DiLoCo", "period": PERIOD, "codec": "int8"},
    "diloco topk": TOPK,
    "local_sgd": {"name": WITNESSED + "LocalSGD", "period": PERIOD},
}
GOSSIP: dict[str, dict[str, Any]] = {
    "gossip": {"name": WITNESSED + "Gossip", "period": PERIOD},
    "noloco": {"name": WITNESSED + "NoLoCo", "period": PERIOD},
}


def run_of(rule: dict[str, Any], steps: int, folder: Path, step_s: float = STEP_S) -> Run:
    return validated(
        {
            "steps": steps,
            "batch_size": 2,
            "evaluate_every": 0,
            "patience_s": 5.0,
            "task": {"name": "tests.chaos.tasks:Paced", "dimension": 64, "spread": 0.0, "step_s": step_s},
            "inner": {"name": "sgd", "lr": 1 / steps},
            "rule": {**rule, "folder": str(folder)},
            "fleet": {"workers": [{"count": WORKERS}]},
        },
        "chaos",
    )


def weathered(rule: dict[str, Any], steps: int, folder: Path, seed: int) -> Storm:
    """Return the storm when it is over; require that every sample is accounted for, and a model that has learned."""
    run = run_of(rule, steps, folder)
    storm = Storm(run, folder, seed)
    asyncio.run(storm.pass_over())
    verify(storm.records)
    (folder / "quiet").mkdir()
    quiet = simulate(run_of(rule, steps, folder / "quiet", step_s=0.0))
    for file in folder.glob("*.params"):
        params = torch.from_numpy(np.fromfile(file, dtype=np.float32))
        learned = quiet.before["loss"] - held_out(run.make_task(), run.seed, params)["loss"]
        assert learned > 0.9 * (quiet.before["loss"] - quiet.after["loss"])  # newcomers train on less
    return storm


@pytest.mark.slow
def test_survivors_hold_the_same_bits(tmp_path: Path) -> None:
    storm = weathered(TOPK, QUICK_STEPS, tmp_path, seed=0)
    assert len(storm.faults) >= 5
    assert require_agreement(storm.records, sights(tmp_path)) > QUICK_STEPS // PERIOD // 2


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", EQUAL)
def test_survivors_hold_the_same_bits_for_long(rule: str, seed: int, tmp_path: Path) -> None:
    storm = weathered(EQUAL[rule], LONG_STEPS, tmp_path, seed)
    require_agreement(storm.records, sights(tmp_path))


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", GOSSIP)
def test_gossip_goes_on(rule: str, seed: int, tmp_path: Path) -> None:
    weathered(GOSSIP[rule], LONG_STEPS, tmp_path, seed)
