"""FedCompass (arXiv 2309.14675): local steps by speed, so that groups of workers arrive together."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, rounds, short
from plain import NOISY, Plain, close
from test_async_local_sgd import QUICK
from torch import Tensor

from decentral.config import Run
from decentral.journal import Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import FedCompass, Int8
from decentral.protocols.codecs import E3M0, Codec
from decentral.protocols.fedcompass import Group
from decentral.sim.simulate import simulate


def arrivals(outcome: Outcome) -> dict[int, list[float]]:
    """Return when each worker's phases ended."""
    ended: dict[int, list[float]] = {}
    for record in outcome.records:
        if isinstance(record, Trained):
            ended.setdefault(record.worker, []).append(record.time_s)
    return ended


def phases(outcome: Outcome) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for record in outcome.records:
        if isinstance(record, Trained):
            steps.setdefault(record.worker, []).append(record.steps)
    return steps


@pytest.mark.parametrize(("step_s", "steps"), [(2.0, 50), (1.0, 100), (5.0, 20), (0.5, 0), (0.9, 0), (6.0, 0)])
def test_who_can_meet_a_group_that_is_due_in_100_seconds(step_s: float, steps: int) -> None:
    """With 20 to 100 local steps; workers that are too quick or too slow for it find nothing."""
    group = Group(100.0, 150.0, {1})
    assert FedCompass().fitting([group], 0.0, step_s) == (steps, group if steps else None)


def test_a_worker_joins_the_group_with_the_most_steps_and_else_begins_one_that_others_can_meet() -> None:
    rule = FedCompass()
    near, far = Group(60.0, 90.0, {0}), Group(90.0, 135.0, {1})
    assert rule.fitting([near, far], 0.0, 1.0) == (90, far)
    assert rule.leading([], 0.0, 2, {2: 4.0}) == 100
    # Group `near` goes on until 90; its quickest, 1 s a step, may then do 100 steps: until 190.
    assert rule.leading([near], 0.0, 2, {0: 1.0, 2: 4.0}) == 47
    assert rule.leading([near], 0.0, 2, {0: 1.0, 2: 20.0}) == 20  # at least Qmin


def test_at_constant_speeds_groups_arrive_together() -> None:
    speeds = (1.0, 0.6, 0.3)
    outcome = simulate(cluster(FedCompass(period=40), steps=300, speeds=speeds))
    pushed = [record for record in outcome.records if isinstance(record, Synced) and len(record.members) == 3]
    pushed = [record for record in pushed if record.time_s < 0.05 * 300]  # then the quickest has spent its budget
    assert len(pushed) >= 3
    ended = arrivals(outcome)
    for record in pushed:
        last = [max(time for time in ended[worker] if time <= record.time_s + 1e-9) for worker in range(3)]
        assert max(last) - min(last) <= 0.05 / min(speeds) + 0.2  # a step of the slowest, and transfers
    assert all(8 <= steps <= 40 for worker in range(3) for steps in phases(outcome)[worker][1:-1])


def test_without_a_choice_of_steps_it_is_a_buffered_asynchronous_server() -> None:
    outcome = simulate(cluster(FedCompass(period=10, ratio=1), steps=60, speeds=(1.0, 0.6, 0.3)))
    assert all(steps == [10] * 6 for steps in phases(outcome).values())


def test_one_worker_is_lookahead() -> None:
    """Every push is an update: model <- model - alpha Delta."""
    run = cluster(FedCompass(period=10, ratio=2, alpha=0.6), 1, 25, task=NOISY)
    plain = Plain(run)
    model = plain.start()
    for steps in (range(5), range(5, 15), range(15, 25)):
        model = model + 0.6 * (plain.sgd(0, steps, model, 0.1) - model)
    assert close(simulate(run).params[0], model)


def test_first_pushes_are_updates_of_their_own_and_then_groups_are() -> None:
    """Workers of equal speed: n workers share alpha, and who comes later is staler."""
    run = cluster(FedCompass(period=10, ratio=2), 3, 5, task=NOISY)
    plain = Plain(run)
    model = plain.start()
    for staleness, worker in enumerate(plain.workers):
        change = plain.start() - plain.sgd(worker, range(5), plain.start(), 0.1)
        model = model - 0.9 / 3 * (1 + staleness) ** -0.5 * change
    assert close(simulate(run).params[0], model)
    longer = simulate(cluster(FedCompass(period=10, ratio=2), 3, 25, task=NOISY))
    members = [records[0].members for records in rounds(longer, "server 0").values()]
    assert members[:4] == [(0,), (1,), (2,), (0, 1, 2)]


class Reference:
    """The rule in plain numbers, given the seconds that each phase of each worker took."""

    def __init__(self, run: Run, rule: FedCompass, took: dict[int, list[float]]) -> None:
        self.plain, self.rule, self.took, self.workers = Plain(run), rule, took, run.fleet.size
        self.model, self.version, self.late_ones = self.plain.start(), 0, 0
        self.step_s: dict[int, float] = {}
        self.groups: list[SimpleNamespace] = []
        self.kept: list[tuple[int, Tensor, int]] = []
        self.came: list[tuple[int, ...]] = []
        self.done: dict[int, list[int]] = {worker: [] for worker in took}
        self.out = {worker: (took[worker][0], 0.0, rule.shortest, self.model, 0) for worker in took}
        while self.out:
            now, worker = min((arrives, worker) for worker, (arrives, *_) in self.out.items())
            latest = min((group.latest for group in self.groups), default=math.inf)
            if now < latest:
                self.arrive(now, worker)
            for group in [group for group in self.groups if not group.out or group.latest <= now]:
                self.close(min(now, latest), group)
        if self.kept:
            self.update(self.kept)

    def arrive(self, now: float, worker: int) -> None:
        _, sent, steps, start, version = self.out.pop(worker)
        first, newest = sum(self.done[worker]), (now - sent) / steps
        push = (worker, start - self.plain.sgd(worker, range(first, first + steps), start, 0.1), version)
        self.done[worker].append(steps)
        self.step_s[worker] = 0.9 * newest + 0.1 * self.step_s.get(worker, newest)
        for group in self.groups:
            if worker in group.out:
                group.out.remove(worker)
                group.came.append(push)
                return
        if len(self.done[worker]) == 1:
            self.update([push])
        else:
            self.kept.append(push)
            self.late_ones += 1
        self.assign(now, worker)

    def close(self, now: float, group: SimpleNamespace) -> None:
        self.groups.remove(group)
        if group.came:
            self.update(group.came + self.kept)
            self.kept = []
        for worker in sorted((worker for worker, *_ in group.came), key=self.step_s.__getitem__):
            self.assign(now, worker)

    def update(self, pushes: list[tuple[int, Tensor, int]]) -> None:
        for _, change, began in pushes:
            self.model = self.model - 0.9 / self.workers * (1 + self.version - began) ** -0.5 * change
        self.version += 1
        self.came.append(tuple(sorted(worker for worker, *_ in pushes)))

    def assign(self, now: float, worker: int) -> None:
        left, t = self.plain.run.steps - sum(self.done[worker]), self.step_s
        if not left:
            return
        most, least = self.rule.period, self.rule.shortest
        meets = [(math.floor((group.due - now) / t[worker]), group) for group in self.groups]
        meets = [(steps, group) for steps, group in meets if least <= steps <= most]
        if meets:
            steps, group = max(meets, key=lambda each: each[0])
        else:
            quickest = [min(t[member] for member in group.members) for group in self.groups]
            ends = [group.latest + most * each for group, each in zip(self.groups, quickest, strict=True)]
            fits = [math.floor((end - now) / t[worker]) for end in ends]
            steps = max(least, max((each for each in fits if each <= most), default=most))
            planned = steps * t[worker]
            group = SimpleNamespace(due=now + planned, latest=now + 1.5 * planned, out=set(), members=set(), came=[])
            self.groups.append(group)
        group.out.add(worker)
        group.members.add(worker)
        arrives = now + self.took[worker][len(self.done[worker])]
        self.out[worker] = (arrives, now, min(steps, left), self.model, self.version)


@pytest.mark.parametrize(("seed", "jitter"), [(0, 0.0), (1, 1.2), (2, 0.8)])
def test_it_equals_the_reference_however_long_phases_take(seed: int, jitter: float) -> None:
    rule = FedCompass(period=20, ratio=4)
    run = cluster(rule, steps=150, task=NOISY, speeds=(1.0, 0.63, 0.31, 0.87), jitter=jitter, seed=seed, **QUICK)
    outcome = simulate(run)
    trained = [record for record in outcome.records if isinstance(record, Trained)]
    took = {worker: [each.seconds for each in trained if each.worker == worker] for worker in range(4)}
    expected = Reference(run, rule, took)
    assert expected.late_ones > 0 or not jitter
    assert phases(outcome) == expected.done
    assert [records[0].members for records in rounds(outcome, "server 0").values()] == expected.came
    assert close(outcome.params[0], expected.model)


def test_a_group_does_not_wait_for_the_dead_for_ever() -> None:
    run = cluster(FedCompass(period=20), 3, 200, task=NET, speeds=(1, 0.6, 0.3), events=[crash(4.0, 2)])
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
    assert outcome.seconds < 25


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_pushes_come_near_to_exact_ones(codec: Codec) -> None:
    exact, coarse = (simulate(cluster(FedCompass(period=10, codec=each), 3, 60)).params[0] for each in (Int8(), codec))
    assert (coarse - exact).norm() < 0.3 * (torch.ones(16) - exact).norm()


def test_time_alone() -> None:
    run = cluster(FedCompass(period=10), steps=60, speeds=(1, 0.6, 0.3))
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds
