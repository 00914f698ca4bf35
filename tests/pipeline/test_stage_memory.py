"""What stages keep in memory, and cuts that fit: closed forms, and what autograd really saves."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from blocks import Chain, named

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.pipeline import Stages, fitting_cuts, measure_memory
from decentral.pipeline.memory import bytes_remembered, in_flight
from decentral.sim.simulate import simulate
from decentral.tasks import ByteGPT
from decentral.workers.worker import _replica

STAGES, LAYERS, WIDTH, SAMPLES, MICROBATCHES = 4, 6, 8, 32, 6
ROW = 4 * SAMPLES * WIDTH
"""Bytes of a microbatch's activations between two layers."""
CUTS = [4, 6, 8]
THREE = {"workers": [{"count": 3}]}
GPT = ByteGPT(width=32, depth=4, heads=4, context=64)


def run_of(recovery: str = "checkfree", fleet: Any = None, **pipeline: Any) -> Run:
    return validated(
        {
            "steps": 2,
            "batch_size": SAMPLES * MICROBATCHES,
            "task": named(Chain, layers=LAYERS, width=WIDTH),
            "rule": {"name": "local_sgd", "period": 1},
            "inner": {"name": "adamw"},
            "pipeline": {"stages": STAGES, "microbatches": MICROBATCHES, "recovery": recovery, **pipeline},
            "fleet": fleet or {"workers": [{"count": STAGES}]},
        },
        "test",
    )


def stages_of(run: Run) -> Stages:
    task = run.make_task()
    cut = run.pipeline.cut(task, run.seed, run.batch_size)
    return Stages(run.pipeline, cut, task, run.seed, run.batch_size, run.inner, run.fleet)


def test_a_layer_remembers_what_goes_in_and_its_activation_what_comes_out() -> None:
    """The input of each layer but the first is the activation before it: counted once."""
    assert bytes_remembered(Chain(layers=3, width=WIDTH), 0, SAMPLES) == [ROW, ROW, 0, ROW, 0, ROW]


def test_attention_is_counted_as_this_machines_kernel_remembers_it() -> None:
    """By shapes alone, to the byte."""
    assert bytes_remembered(GPT, 0, 4) == measure_memory(GPT, 0, 4, torch.device("cpu"))


@pytest.mark.parametrize("order", ["1f1b", "gpipe"])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_a_stage_remembers_as_many_microbatches_as_are_under_way(order: Any, microbatches: int) -> None:
    """1F1B: S - s at stage s; GPipe: all. Of each: what came in and went out, and its layers' results."""
    run = run_of(order=order, microbatches=microbatches, cuts=CUTS)
    run = run.model_copy(update={"batch_size": SAMPLES * microbatches})
    stages = stages_of(run)
    for stage in range(STAGES):
        held = min(microbatches, STAGES - stage) if order == "1f1b" else microbatches
        assert in_flight(order, microbatches, STAGES, stage) == held
        layers = 1 if stage in (1, 2) else 2
        received, remembered = (0, layers + 1) if stage == 0 else (1, layers)
        assert stages.parts(stage)["activations"] == held * (received + remembered + 1) * ROW


def test_state_is_parameters_gradients_optimiser_and_copies_of_the_stage_behind() -> None:
    layer = 4 * (WIDTH * WIDTH + WIDTH)
    parts = stages_of(run_of("redundant", cuts=CUTS)).parts(2)
    assert parts.pop("activations") > 0
    assert parts == {"parameters": layer, "gradients": layer, "inner optimiser": 2 * layer, "copies": 2 * 4 * layer}


def test_cuts_that_fit_are_the_fastest_of_these() -> None:
    """Against a look at all cuts: late stages may have more layers, for they remember fewer microbatches."""
    whole = run_of(stages=3, fleet=THREE)
    found: dict[tuple[int, ...], tuple[int, float]] = {}
    for cuts in combinations(range(1, 2 * LAYERS), 2):
        try:
            each = stages_of(run_of(stages=3, fleet=THREE, cuts=list(cuts)))
        except ConfigError:
            continue  # a stage without parameters
        needs = max(sum(each.parts(stage).values()) for stage in range(3))
        found[cuts] = needs, max(each.cut.share(each.cut.of(stage)) for stage in range(3))
    assert min(found.values())[1] > min(slowest for _, slowest in found.values()), "the fastest do not fit everywhere"

    def fitting(room: float) -> tuple[int, ...]:
        return fitting_cuts(whole.pipeline, whole.make_task(), 0, whole.batch_size, whole.inner, [room] * 3)

    for room in sorted({needs for needs, _ in found.values()})[:4]:
        fastest = min(slowest for needs, slowest in found.values() if needs <= room)
        needs, slowest = found[fitting(room)]
        assert needs <= room
        assert slowest == pytest.approx(fastest)
    with pytest.raises(ConfigError, match="no cuts of the model into 3 stages fit into memory"):
        fitting(min(found.values())[0] - 1)


def test_a_stage_that_remembers_too_much_is_refused_with_cuts_that_fit() -> None:
    """The first one of two remembers two microbatches of 128 windows, 8 GiB each; a block fewer, and both fit."""
    task = {"name": "byte_gpt", "width": 1024, "depth": 4, "heads": 8, "context": 512}
    fleet = {"workers": [{"count": 2, "device": "T4", "step_time_s": 1.0}]}
    run = run_of(stages=2, microbatches=4, fleet=fleet).model_copy(update={"task": task, "batch_size": 512})
    with pytest.raises(
        ConfigError, match=r"worker 0 is a T4 with 16 GiB, and needs 16\.\d GiB: .* activations 16"
    ) as caught:
        simulate(run, timing_only=True)
    assert "; take pipeline.cuts = [2], which fit; more stages" in str(caught.value)
    pipeline = run.pipeline.model_copy(update={"cuts": (2,)})
    simulate(run.model_copy(update={"pipeline": pipeline}), timing_only=True)
    hoarding = run.model_copy(update={"pipeline": pipeline.model_copy(update={"order": "gpipe"})})
    with pytest.raises(ConfigError, match="take more stages, or more microbatches"):
        simulate(hoarding, timing_only=True)


def test_a_worker_says_that_its_stage_does_not_fit_before_it_makes_one() -> None:
    """Six TB of parameters and what goes with them: more than there is anywhere."""
    run = run_of(stages=2, fleet={"workers": [{"count": 2}]})
    task = {"name": "byte_gpt", "width": 65536, "depth": 8, "heads": 8, "context": 16}
    with pytest.raises(
        ConfigError, match=r"worker 1 has stage 1 and the device 'cpu' with .* GiB, and needs \d+"
    ) as caught:
        _replica(run.model_copy(update={"task": task}), 1, torch.device("cpu"))
    assert "take more stages, or more microbatches, which are smaller" in str(caught.value)
