"""Decoupled DiLoCo (arXiv 2604.21428): its equations, Streaming DiLoCo as a special case, learners that fall behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, quadratic, replicas, rounds, short
from test_streaming_diloco import Strides
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import Fleet, WorkerGroup
from decentral.inner import SGD, AdamW, Inner
from decentral.journal import Synced, Trained
from decentral.protocols import Balanced, DecoupledDiLoCo, Float32, Int8, Nesterov, OuterSGD, StreamingDiLoCo, Whole
from decentral.protocols.codecs import E3M0, TopK
from decentral.protocols.fragments import require_partition
from decentral.protocols.merge import radial_mean
from decentral.sim.simulate import simulate
from decentral.state import Entry, Layout

QUICK: dict[str, Any] = {"latency_s": 0.001, "up_bps": 1e9, "down_bps": 1e9}
"""A round takes a few milliseconds, a step fifty: what is launched at one look has come by the next."""


def reference(run: Run, fragments: int, period: int, overlap: int, eta: float, mu: float) -> Tensor:
    """Equal learners and a quorum of all, look by look on plain float64 tensors; returns the global model."""
    task = quadratic(run)
    curvature = task.curvatures().double()
    centres = torch.stack([task.centre(worker) for worker in range(run.fleet.size)]).double()
    theta = torch.full_like(centres, task.start)
    model = torch.full((task.dimension,), task.start, dtype=torch.float64)
    momentum = torch.zeros_like(model)
    edges = [task.dimension * part // 12 for part in range(13)]
    owner = torch.zeros(task.dimension, dtype=torch.long)
    for part in range(12):
        owner[edges[part] : edges[part + 1]] = part % fragments
    taken, inbox, launched = [0] * fragments, set(), 0
    gap = period / fragments
    due = gap

    def take(step: int) -> None:
        for p in inbox:
            theta[:, owner == p] = model[owner == p]
            taken[p] = step
        inbox.clear()

    def launch(step: int) -> None:
        nonlocal launched
        p = launched % fragments
        launched += 1
        if p in inbox or taken[p] == step:
            return
        mine = owner == p
        delta = model[mine] - theta[:, mine].mean(dim=0)
        momentum[mine] = mu * momentum[mine] + delta
        model[mine] -= eta * (delta + mu * momentum[mine])
        inbox.add(p)

    step = 0
    while step < run.steps:
        steps = min(overlap, run.steps - step)
        theta = centres + (1 - run.inner.lr * curvature) ** steps * (theta - centres)
        step += steps
        take(step)
        while due <= step:
            launch(step)
            due = max(due, step - overlap) + gap
            if step == run.steps:
                take(step)
    take(step)
    while any(at != step for at in taken):
        launch(step)
        take(step)
    return model


@pytest.mark.parametrize(
    ("fragments", "period", "overlap", "steps"),
    [(1, 6, 2, 24), (1, 6, 2, 21), (3, 6, 2, 27), (4, 6, 1, 20), (4, 4, 3, 30)],
)
def test_equal_learners_follow_the_equations(fragments: int, period: int, overlap: int, steps: int) -> None:
    rule = DecoupledDiLoCo(
        period=period,
        fragments=Strides(count=fragments),
        overlap=overlap,
        quorum=3,
        radial=False,
        outer=Nesterov(lr=0.5),
    )
    run = cluster(rule, 3, steps, task={"name": "quadratic", "dimension": 30}, **QUICK)
    outcome = simulate(run)
    assert all_equal(outcome)
    expected = reference(run, fragments, period, overlap, eta=0.5, mu=0.9)
    assert torch.allclose(outcome.params[0].double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("inner", [SGD(lr=0.1), AdamW(lr=0.05)], ids=short)
@pytest.mark.parametrize("steps", [24, 27])
def test_with_a_full_quorum_and_equal_speeds_it_is_streaming_diloco_bit_for_bit(inner: Inner, steps: int) -> None:
    decoupled = DecoupledDiLoCo(period=6, fragments=Whole(), overlap=2, quorum=3, radial=False)
    streaming = StreamingDiLoCo(
        period=6, fragments=Whole(), overlap=2, alpha=0.0, outer=Nesterov(), codec=Float32(), all_reduce="butterfly"
    )
    one, other = (simulate(cluster(rule, 3, steps, task=NET, inner=inner, **QUICK)) for rule in (decoupled, streaming))
    assert torch.equal(replicas(one), replicas(other))


class Recorded(OuterSGD):
    """Keeps every gradient that it is given."""

    seen: Any = None

    def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
        self.seen.append(gradient.clone())
        super().step(anchor, gradient, momentum)


def test_learners_count_by_their_tokens() -> None:
    """The slow learner has done half the steps when the syncer asks: it counts half as much."""
    outer = Recorded(seen=[])
    rule = DecoupledDiLoCo(period=8, fragments=Whole(), overlap=2, quorum=2, radial=False, outer=outer)
    run = cluster(rule, 2, 12, speeds=(1.0, 0.5), batch_size=3, **QUICK)
    simulate(run)
    task = quadratic(run)
    fast, slow = (task.start - task.after_sgd(0, 0.1, 8)), (task.start - task.after_sgd(1, 0.1, 4))
    assert torch.allclose(outer.seen[0], (2 * fast + slow) / 3, atol=1e-6)


# -- nobody waits -----------------------------------------------------------------------------------------------------


def with_workers(run: Run, *groups: WorkerGroup, **fleet: Any) -> Run:
    return run.model_copy(update={"fleet": Fleet(workers=groups, **fleet)})


def test_who_is_late_is_left_out_and_nobody_waits_for_it() -> None:
    task = {"name": "quadratic", "dimension": 4000}
    run = cluster(DecoupledDiLoCo(period=4, fragments=Whole(), quorum=2, grace=0.0), 3, 40, task=task)
    run = with_workers(run, WorkerGroup(count=2), WorkerGroup(up_bps=2e5), latency_s=0.001)  # 0.64 s for a model
    outcome = simulate(run)
    members = [
        records[0].members for records in rounds(outcome, "learners 0").values() if records[0].outcome == "committed"
    ]
    assert members.count((0, 1)) >= 8
    for worker in (0, 1, 2):
        ends = [record.time_s for record in outcome.records if isinstance(record, Trained) and record.worker == worker]
        assert ends[-1] == pytest.approx(40 * 0.05)
    assert all_equal(outcome)


def test_the_grace_waits_for_those_who_are_nearly_there() -> None:
    """Their answers take 26 ms, two steps 100 ms; without grace the syncer's own worker is always the quorum."""
    task = {"name": "quadratic", "dimension": 400}

    def sizes(grace: float) -> list[int]:
        rule = DecoupledDiLoCo(period=4, fragments=Whole(), grace=grace)
        outcome = simulate(cluster(rule, 3, 40, task=task, latency_s=0.012))
        return [len(r[0].members) for r in rounds(outcome, "learners 0").values() if r[0].outcome == "committed"]

    assert set(sizes(0.0)[:9]) == {1}
    assert set(sizes(1.0)[:9]) == {3}


@pytest.mark.parametrize(("speed", "takes_part"), [(0.5, True), (0.2, True), (0.1, False)])
def test_a_slow_learner_takes_part_if_it_looks_twice_in_a_period(speed: float, takes_part: bool) -> None:
    """One look takes what came, the next has steps to answer with."""
    rule = DecoupledDiLoCo(period=24, fragments=Whole(), overlap=2)
    outcome = simulate(cluster(rule, 2, 120, speeds=(1.0, speed), **QUICK))
    asked = [records[0] for records in rounds(outcome, "learners 0").values()]
    during = [1 in record.members for record in asked if 24 * 0.05 < record.time_s < 120 * 0.05]
    assert len(during) == 4
    assert all(during) == takes_part


@pytest.mark.parametrize("fragments", [1, 3])
def test_the_launch_floor_holds_on_a_fast_link(fragments: int) -> None:
    rule = DecoupledDiLoCo(period=6, fragments=Strides(count=fragments))
    outcome = simulate(cluster(rule, 2, 60, latency_s=0.0, up_bps=1e12, down_bps=1e12))
    launched = [records[0].time_s for records in rounds(outcome, "learners 0").values()]
    during = [time_s for time_s in launched if time_s <= 60 * 0.05]
    assert abs(len(during) - 10 * fragments) <= 1
    assert len(launched) <= len(during) + fragments + 1


def test_a_link_too_slow_for_our_patience_cannot_keep_the_run_from_ending() -> None:
    task = {"name": "quadratic", "dimension": 4000}
    run = cluster(DecoupledDiLoCo(period=4, fragments=Whole()), 3, 20, task=task, patience_s=0.5)
    outcome = simulate(with_workers(run, WorkerGroup(count=2), WorkerGroup(up_bps=1e5)))  # 1.3 s for a model
    assert [left.reason for left in outcome.left()] == ["finished"] * 3
    assert outcome.seconds < 20 * 0.05 + 6 * 0.5 + 10 * 1.3
    assert torch.equal(outcome.params[0], outcome.params[1])


# -- churn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [0, 2])
@pytest.mark.parametrize("at_s", [0.02, 0.31, 0.62, 1.5])
def test_the_run_goes_on_without_the_syncer_and_without_a_learner(at_s: float, worker: int) -> None:
    rule = DecoupledDiLoCo(period=6, fragments=Strides())
    outcome = simulate(cluster(rule, 4, 60, events=[crash(at_s, worker)], detection_s=0.1, patience_s=5.0))
    assert sorted(outcome.params) == [left for left in range(4) if left != worker]
    assert all_equal(outcome)
    assert outcome.after["loss"] < outcome.before["loss"]
    assert outcome.seconds < 60 * 0.05 + 1.5
    assert bool(rounds(outcome, "learners 1")) == (worker == 0)


def test_one_learner_alone() -> None:
    outcome = simulate(cluster(DecoupledDiLoCo(period=4, fragments=Strides()), 1, 20))
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize("codec", [Int8(), E3M0()], ids=short)
def test_coarse_outer_gradients(codec: Int8 | E3M0) -> None:
    task = {"name": "quadratic", "dimension": 2000}
    exact, coarse = (
        simulate(cluster(DecoupledDiLoCo(period=6, fragments=Strides(), codec=each), 3, 48, task=task))
        for each in (Float32(), codec)
    )
    assert all_equal(coarse)
    assert coarse.after["loss"] == pytest.approx(exact.after["loss"], rel=0.2)
    assert coarse.left()[1].sent_bytes < 0.4 * exact.left()[1].sent_bytes


def test_timing_only_tells_the_same_story() -> None:
    run = cluster(DecoupledDiLoCo(period=6, fragments=Strides()), 3, 30, speeds=(1.0, 0.7, 0.4), jitter=0.3)
    real, timing = simulate(run), simulate(run, timing_only=True)
    assert timing.seconds == real.seconds
    stories = [
        [(r.time_s, r.worker, r.sent_bytes, r.members) for r in outcome.records if isinstance(r, Synced)]
        for outcome in (real, timing)
    ]
    assert stories[0] == stories[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quorum": 4}, "4 contributions cannot come from 3 workers"),
        ({"period": 3, "overlap": 4}, "looks every 4 steps"),
        ({"codec": TopK()}, "cannot know whether"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoupledDiLoCo(**fields).check(3)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_radial_mean_keeps_lengths() -> None:
    east, north = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert torch.allclose(radial_mean([east, north], [1, 1]), torch.tensor([3.0, 3.0]) / 2**0.5)
    assert torch.allclose(radial_mean([east, 3 * north], [3, 1]), 4.5 * torch.tensor([3.0, 1.0]) / 10**0.5)
    assert torch.allclose(radial_mean([east, east], [1, 5]), east)
    assert torch.allclose(radial_mean([east, torch.zeros(2)], [1, 1]), east / 2)
    assert torch.equal(radial_mean([torch.zeros(2), torch.zeros(2)], [1, 1]), torch.zeros(2))
    assert torch.allclose(radial_mean([east, -3 * east], [1, 1]), -east)  # directions cancel: the mean


def test_layers_are_merged_radially_and_what_stands_outside_is_not() -> None:
    def final(task: dict[str, Any], radial: bool) -> Tensor:
        return simulate(cluster(DecoupledDiLoCo(period=4, radial=radial), 3, 24, task=task)).params[0]

    no_layers = {"name": "quadratic", "dimension": 20}
    assert torch.equal(final(no_layers, True), final(no_layers, False))
    assert not torch.equal(final(NET, True), final(NET, False))


def test_balanced_fragments_are_whole_tensors_of_about_equal_size() -> None:
    sizes = [400, 30, 30, 200, 210, 10, 5, 390, 60]
    entries, place = [], 0
    for size in sizes:
        entries.append(Entry(f"t{place}", (size,), place, place + size))
        place += size
    layout = Layout(tuple(entries))
    fragments = Balanced(count=3).split(layout)
    require_partition(fragments, layout)
    assert max(fragment.size for fragment in fragments) - min(fragment.size for fragment in fragments) <= 60
    assert sorted(span for fragment in fragments for span in fragment.tensors(layout)) == [
        (entry.start, entry.stop) for entry in entries
    ]
    assert len(Balanced().split(layout)) == len(sizes)
