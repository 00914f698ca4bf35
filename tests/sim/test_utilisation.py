"""Layer by layer: phases that begin and end with one layer after the other, and the table they are there for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from cluster import all_equal, cluster, crash, outcomes, replicas
from sockets import train_here

from benchmarks.utilisation import (
    GRID,
    MODELS,
    NOMINAL,
    PAPER,
    RULES,
    UTILISATIONS,
    Model,
    needed_gbps,
    notch_of,
    utilisation,
)
from decentral.config import Run, Sim
from decentral.inner import AdamW
from decentral.journal import Trained
from decentral.outcome import Outcome
from decentral.protocols import E3M0, DiLoCo, Float32, Layers, Nesterov, StreamingDiLoCo
from decentral.sim.simulate import simulate

STACK = {"name": "layer_stack", "layers": 6, "parameters": 1200}
SLOW: dict[str, Any] = {"up_bps": 2e5, "down_bps": 2e5, "latency_s": 0.01, "step_time_s": 0.05}
"""A layer of `STACK` takes 0.04 s on such a link, a step 0.05 s."""


def run_of(layerwise: bool, steps: int = 22, overlap: int = 1, codec: Any = None, **fields: Any) -> Run:
    rule = StreamingDiLoCo(
        period=8, fragments=Layers(layers=2), buckets=Layers(layers=1), overlap=overlap, codec=codec or Float32()
    )
    inner = AdamW(lr=0.02, clip_norm=1.0)
    return cluster(rule, 3, steps, task=STACK, inner=inner, layerwise=layerwise, **{**SLOW, **fields})


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    assert one.params.keys() == other.params.keys()
    for worker in one.params:
        assert one.params[worker].equal(other.params[worker])
        assert all(slot.equal(other.slots[worker][name]) for name, slot in one.slots[worker].items())


# Results.


@pytest.mark.parametrize("codec", [Float32(), E3M0()], ids=["float32", "e3m0"])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_layer_by_layer_changes_no_bit_and_saves_time(overlap: int, codec: Any) -> None:
    block, layerwise = (simulate(run_of(way, overlap=overlap, codec=codec)) for way in (False, True))
    assert_same_bits(block, layerwise)
    assert block.after == layerwise.after
    assert layerwise.seconds < block.seconds


def test_one_fragment_in_layers_is_diloco() -> None:
    fields: dict[str, Any] = {"task": STACK, "inner": AdamW(lr=0.02, clip_norm=1.0), **SLOW}
    one = StreamingDiLoCo(
        period=8, fragments="whole", buckets=Layers(layers=1), overlap=0, alpha=0.0, codec=Float32(), outer=Nesterov()
    )
    streaming = simulate(cluster(one, 3, 24, layerwise=True, **fields))
    diloco = simulate(cluster(DiLoCo(period=8, all_reduce="gather"), 3, 24, **fields))
    assert replicas(streaming).equal(replicas(diloco))
    assert all(streaming.slots[0][name].equal(diloco.slots[0][name]) for name in ("anchor", "momentum"))
    assert streaming.seconds < diloco.seconds


def test_real_workers_come_to_the_same_bits() -> None:
    run = run_of(True, steps=12, speeds=(1.0, 0.7, 0.4))
    assert_same_bits(train_here(run), simulate(run))


def test_other_processes_compute_the_same_bits() -> None:
    run = run_of(True)
    alone, pooled = (simulate(run.model_copy(update={"sim": Sim(processes=processes)})) for processes in (1, 2))
    assert_same_bits(alone, pooled)
    assert [record.to_json() for record in alone.records] == [record.to_json() for record in pooled.records]


def test_evaluations_see_what_they_see_in_one_block() -> None:
    runs = [run_of(way).model_copy(update={"evaluate_every": 4}) for way in (False, True)]
    block, layerwise = (simulate(run).evaluations() for run in runs)
    assert [(item.step, item.metrics) for item in block] == [(item.step, item.metrics) for item in layerwise]
    assert len(block) > 3


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_timing_only_tells_the_same_times(jitter: float) -> None:
    run = run_of(True, jitter=jitter)
    times = [
        [(record.time_s, record.worker) for record in simulate(run, timing_only=timing).records]
        for timing in (False, True)
    ]
    assert times[0] == times[1]


@pytest.mark.parametrize("at_s", [0.42, 0.45, 0.47, 0.52])
def test_survivors_of_a_crash_are_equal(at_s: float) -> None:
    outcome = simulate(run_of(True, events=[crash(at_s, 1)], detection_s=0.1))
    assert sorted(outcome.params) == [0, 2]
    assert all_equal(outcome)
    told = [said for fragment in range(4) for said in outcomes(outcome, f"fragment {fragment}")]
    assert all(len(of_round) == 1 for of_round in told)
    assert {kind for of_round in told for kind, _ in of_round} == {"committed", "degraded"}


# Times.


def test_a_worker_that_waits_for_a_layer_does_not_compute() -> None:
    run = run_of(True, overlap=0)
    outcome = simulate(run, timing_only=True)
    for left in outcome.left():
        trained = [item for item in outcome.records if isinstance(item, Trained) and item.worker == left.worker]
        assert left.seconds["compute"] == pytest.approx(run.steps * 0.05, rel=1e-9)
        assert math.fsum(item.seconds for item in trained) == pytest.approx(run.steps * 0.05, rel=1e-9)
        assert math.fsum(left.seconds.values()) == pytest.approx(left.time_s, rel=1e-9)
        assert left.time_s > 1.5 * run.steps * 0.05


def sketch(model: Model, gbps: float, bits: float, groups: list[list[int]], period: int, overlap: int) -> float:
    """The paper's model in one loop: a device that does one layer after the other, and a link that sends in order.

    `groups[p]` are the layers that are sent in step H + p s, 2 H + p s, ..., s = H / (groups + 1). Returns the share of
    computing in the third period.
    """
    spacing = max(1, period // (len(groups) + 1))
    forward_s, backward_s = model.step_s / 3 / model.layers, 2 * model.step_s / 3 / model.layers
    transfer_s = bits * model.parameters / model.layers / (gbps * 1e9)
    now = link = 0.0
    needed: dict[int, tuple[int, float]] = {}
    ended = []
    for step in range(1, 3 * period + 1):
        past = step - period
        slot, rest = divmod(past % period, spacing)
        due = groups[slot] if past >= 0 and rest == 0 and slot < len(groups) else []
        for layer in range(model.layers):
            if layer in needed and needed[layer][0] <= step:
                now = max(now, needed.pop(layer)[1])
            now += forward_s
        for layer in reversed(range(model.layers)):
            now += backward_s
            if layer in due:
                link = max(link, now) + transfer_s
                needed[layer] = (step + 1 + overlap, link)
        ended.append(now)
    return period * model.step_s / (ended[-1] - ended[-1 - period])


@pytest.mark.parametrize("gbps", [1.0, 5.0, 20.0, 150.0])
@pytest.mark.parametrize("rule", RULES)
def test_messages_of_the_rules_take_what_a_loop_over_the_layers_says(rule: str, gbps: float) -> None:
    """Flows share a link max-min fairly here and queue there: the last layer that anybody waits for ends alike."""
    model = MODELS[0]
    strided = [[layer for layer in range(24) if layer % 8 == group] for group in range(8)]
    everything = [list(range(24))]
    groups = {"data-parallel": everything, "DiLoCo": everything}.get(rule, strided)
    period = 1 if rule == "data-parallel" else 100
    bits = 4.0 if rule == "+ E3M0" else 16.0
    expected = sketch(model, gbps, bits, groups, period, int(rule.startswith("+")))
    assert utilisation(rule, model, gbps, NOMINAL) == pytest.approx(expected, rel=0.01)


# The table.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("model", "share"), [(0, 0.99), (1, 0.5), (1, 0.9)])
def test_the_published_bandwidths_are_met_within_a_notch(rule: str, model: int, share: float) -> None:
    published = PAPER[rule][model][UTILISATIONS.index(share)]
    assert abs(notch_of(needed_gbps(rule, MODELS[model], share)) - notch_of(published)) <= 1


def test_the_grid_is_the_papers() -> None:
    """Every value that the paper prints is a bandwidth of the grid with one decimal, however it was rounded."""
    printed = [value for rows in PAPER.values() for row in rows for value in row]
    assert all(abs(GRID[notch_of(value)] - value) < 0.1 for value in printed)
