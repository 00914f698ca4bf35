"""How long local steps take: closed forms, and an integral that is added up by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cluster import scripted

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.fleet import Event, Fleet, Preemption, Slowing, Stalls, WorkerGroup
from decentral.fleet.happenings import happenings
from decentral.peer import Peer
from decentral.sim.durations import Durations
from decentral.sim.simulate import simulate

STEP_S = 0.05


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def durations(group: WorkerGroup, *events: Event, seed: int = 0, **fleet: Any) -> tuple[Durations, Clock]:
    clock = Clock()
    return Durations(Fleet(workers=(group,), **{"step_time_s": STEP_S, **fleet}), seed, events, clock), clock


def seconds(group: WorkerGroup, steps: float, *events: Event, at_s: float = 0.0, **fleet: Any) -> float:
    duration, clock = durations(group, *events, **fleet)
    clock.now = at_s
    return duration(0, steps)


def slow(at_s: float, factor: float, until_s: float | None = None) -> Event:
    return Event(at_s=at_s, kind="slow", worker=0, factor=factor, until_s=until_s)


def test_steps_take_their_time_at_the_workers_speed() -> None:
    assert seconds(WorkerGroup(), 20) == 20 * STEP_S
    assert seconds(WorkerGroup(speed=0.4), 20) == 20 * STEP_S / 0.4
    assert seconds(WorkerGroup(speed=0.5, step_time_s=0.3), 20) == 20 * 0.3 / 0.5
    assert seconds(WorkerGroup(), 0.25) == 0.25 * STEP_S


def test_jitter_has_mean_one_and_the_sigma_of_its_group() -> None:
    duration, _ = durations(WorkerGroup(jitter=0.3), jitter=0.0)
    factors = np.array([duration(0, 1) for _ in range(4000)]) / STEP_S
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
    assert np.log(factors).std() == pytest.approx(0.3, rel=0.04)
    steady, _ = durations(WorkerGroup(jitter=0.0), jitter=0.5)
    assert steady(0, 10) == 10 * STEP_S


@pytest.mark.parametrize(("at_s", "begun"), [(0.0, 1), (0.07, 2), (0.99, 20), (5.0, 20)])
def test_steps_that_are_cut_end_with_the_one_at_hand(at_s: float, begun: int) -> None:
    duration, clock = durations(WorkerGroup())
    duration(0, 20)
    clock.now = at_s
    assert duration.cut(0, 20, 0.0) == (begun, pytest.approx(begun * STEP_S))


def test_steps_that_are_cut_on_a_slow_machine_take_as_long_as_if_asked_for_alone() -> None:
    """At half the speed from 0.1 s on: two steps in 0.1 s, then one in a tenth."""
    duration, clock = durations(WorkerGroup(), slow(0.1, 0.5))
    duration(0, 20)
    clock.now = 0.25
    assert duration.cut(0, 20, 0.0) == (4, pytest.approx(seconds(WorkerGroup(), 4, slow(0.1, 0.5))))
    assert seconds(WorkerGroup(), 4, slow(0.1, 0.5)) == pytest.approx(0.3)


def test_what_is_cut_off_is_not_drawn() -> None:
    cut, clock = durations(WorkerGroup(jitter=0.3))
    whole, _ = durations(WorkerGroup(jitter=0.3))
    apart = [whole(0, 1) for _ in range(30)]
    assert cut(0, 20) == pytest.approx(sum(apart[:20]))
    clock.now = sum(apart[:7]) + 0.5 * apart[7]
    assert cut.cut(0, 20, 0.0) == (8, pytest.approx(sum(apart[:8])))
    assert [cut(0, 1) for _ in range(22)] == pytest.approx(apart[8:])


def test_a_slow_worker_loses_what_it_would_have_done() -> None:
    # 1 s of work at pace 1: 0.1 s at pace 1, 0.4 s at half pace, the rest at pace 1.
    assert seconds(WorkerGroup(), 20, slow(0.1, 0.5, 0.5)) == pytest.approx(1.2, rel=1e-12)
    assert seconds(WorkerGroup(), 20, slow(0.1, 0.25)) == pytest.approx(0.1 + 0.9 / 0.25, rel=1e-12)
    # Two that overlap multiply: 0.2 s at 1/2, then 1/4 for ever.
    assert seconds(WorkerGroup(), 20, slow(0.0, 0.5), slow(0.2, 0.5)) == pytest.approx(0.2 + 0.9 / 0.25, rel=1e-12)
    assert seconds(WorkerGroup(), 20, slow(0.1, 0.5, 0.5), at_s=0.5) == pytest.approx(1.0, rel=1e-12)


def test_a_wearing_machine_slows_down_linearly_to_its_floor() -> None:
    group = WorkerGroup(step_time_s=1, slowing=Slowing(from_s=100, per_hour=3.6, floor=0.5))  # 0.1 % a second
    assert seconds(group, 100) == pytest.approx(100, rel=1e-12)
    # From 100 s on the pace is 1 - t / 1000: after t seconds t - t^2 / 2000 steps are done.
    assert seconds(group, 300 - 300**2 / 2000, at_s=100) == pytest.approx(300, rel=1e-12)
    # The floor is reached after 500 s and 375 steps; then two seconds a step.
    assert seconds(group, 375 + 10, at_s=100) == pytest.approx(500 + 20, rel=1e-12)
    assert seconds(group, 10, at_s=700) == pytest.approx(20, rel=1e-12)


def test_pauses_come_at_their_rate_and_take_their_time() -> None:
    group = WorkerGroup(step_time_s=1, stalls=Stalls(per_hour=36, duration_s=50))
    done = 400_000
    expected = done * (1 + 36 * 50 / 3600)  # half a second of pause for each second of work
    assert seconds(group, done) == pytest.approx(expected, rel=0.03)
    assert seconds(group, done) == seconds(group, done)
    assert seconds(group, done, seed=1) != seconds(group, done)


def test_steps_one_by_one_take_as_long_as_together() -> None:
    group = WorkerGroup(
        slowing=Slowing(from_s=0.5, per_hour=600, floor=0.3), stalls=Stalls(per_hour=1800, duration_s=0.4)
    )
    together = seconds(group, 200, slow(3, 0.5, 7))
    duration, clock = durations(group, slow(3, 0.5, 7))
    for _ in range(200):
        clock.now += duration(0, 1)
    assert clock.now == pytest.approx(together, rel=1e-9)


def test_work_is_done_when_the_integral_of_the_pace_has_reached_it() -> None:
    group = WorkerGroup(slowing=Slowing(from_s=2, per_hour=360, floor=0.2))
    took = seconds(group, 100, slow(1, 0.5, 4), slow(3, 0.3, 6), at_s=0.7)
    grid = 0.7 + (np.arange(1_000_000) + 0.5) * took / 1_000_000
    pace = np.clip(1 - (grid - 2) * 0.1, 0.2, 1)
    pace *= np.where((grid >= 1) & (grid < 4), 0.5, 1) * np.where((grid >= 3) & (grid < 6), 0.3, 1)
    assert pace.mean() * took == pytest.approx(100 * STEP_S, rel=1e-6)


# In whole runs.


def make_run(**table: Any) -> Run:
    async def script(peer: Peer) -> None:
        while await peer.train(10):
            pass

    base = {
        "rule": scripted(script)[0],
        "steps": 20,
        "evaluate_every": 0,
        "task": {"name": "quadratic"},
        "inner": {"name": "sgd", "lr": 0.1},
    }
    return validated({**base, **table}, "test")


def test_a_run_is_slowed_down_while_the_event_lasts() -> None:
    event = {"at_s": 0.1, "kind": "slow", "worker": 0, "factor": 0.5, "until_s": 0.5}
    run = make_run(fleet={"workers": [{}], "step_time_s": STEP_S, "events": [event]})
    assert simulate(run, timing_only=True).seconds == pytest.approx(1.2, rel=1e-12)


def test_a_preempted_worker_goes_when_its_notice_is_over() -> None:
    event = {"at_s": 0.2, "kind": "preempt", "worker": 1, "notice_s": 0.3}
    run = make_run(fleet={"workers": [{"count": 2}], "step_time_s": STEP_S, "events": [event]})
    left = {record.worker: record.time_s for record in simulate(run, timing_only=True).left()}
    assert left == {0: pytest.approx(1.0), 1: 0.5}


def test_a_devices_step_takes_its_flops_at_its_share_of_the_peak() -> None:
    fleet = {"workers": [{"device": "A100-80", "dtype": "bfloat16", "mfu": 0.4}]}
    run = make_run(fleet=fleet, batch_size=4, task={"name": "byte_gpt", "width": 32, "depth": 1, "context": 16})
    parameters = sum(parameter.numel() for parameter in run.make_task().model().parameters())
    expected = 20 * 6 * parameters * 16 * 4 / (312e12 * 0.4)
    assert simulate(run, timing_only=True).seconds == pytest.approx(expected, rel=1e-12)
    known = make_run(fleet={**fleet, "step_flops": 312e12})
    assert simulate(known, timing_only=True).seconds == pytest.approx(20 / 0.4, rel=1e-12)
    measured = make_run(fleet={"workers": [{"device": "A100-80", "step_time_s": 0.3}]})
    assert simulate(measured, timing_only=True).seconds == pytest.approx(20 * 0.3, rel=1e-12)


GIB = 2**30


def large(rule: str, billions: float, **table: Any) -> Run:
    return make_run(
        rule={"name": rule, "codec": "float32"},
        inner={"name": "adamw"},
        task={"name": "layer_stack", "layers": 4, "parameters": billions * 1e9},
        steps=1,
        fleet={"workers": [{"count": 2, "device": "A100-80", "step_time_s": 1}]},
        **table,
    )


def test_what_does_not_fit_into_the_device_is_refused_with_the_figures() -> None:
    # Parameters, gradients and AdamW's two means; DiLoCo adds anchor and momentum: 6 x 4 bytes x 5e9 are 112 GiB.
    with pytest.raises(ConfigError) as caught:
        simulate(large("diloco", 5), timing_only=True)
    one = 4 * 5e9 / GIB
    assert f"is a A100-80 with 80 GiB, and needs {6 * one:.1f} GiB before activations" in str(caught.value)
    assert f"parameters {one:.1f}, gradients {one:.1f}, inner optimiser {2 * one:.1f}, rule {2 * one:.1f}" in str(
        caught.value
    )


def test_what_fits_is_simulated() -> None:
    simulate(large("ddp", 5), timing_only=True)  # 4 x 4 bytes x 5e9 are 75 GiB
    simulate(large("diloco", 5, real={"offload": True}), timing_only=True)
    simulate(large("diloco", 3), timing_only=True)


def test_churn_takes_workers_when_its_model_says() -> None:
    churn = Preemption(rate_per_hour=720, group_mean=2, notice_s=0)  # one in five seconds, each; none comes back
    run = make_run(steps=200, fleet={"workers": [{"count": 8}], "step_time_s": STEP_S}, seed=3)
    run = run.model_copy(update={"fleet": run.fleet.model_copy(update={"churn": churn})})
    left = {record.worker: record.time_s for record in simulate(run, timing_only=True).left()}
    gone = {event.worker: event.gone_at_s for event in happenings(run.fleet, 3)}
    assert left == {worker: pytest.approx(min(gone[worker], 200 * STEP_S)) for worker in range(8)}
    assert 1 < sum(at_s < 200 * STEP_S for at_s in gone.values()) < 8
