"""How long local steps take: unequal machines that jitter, wear out, pause and are slowed down, in virtual time.

Without any of that, `steps` local steps take `steps x step time / speed`. Jitter multiplies this by log-normal factors
of mean 1, one a step. What changes in the course of time is followed exactly: work is done when the integral of the
machine's pace over time has reached it. The pace is 1 for a healthy machine, 0 while it pauses, the product of the
factors of all "slow" events that last, and it falls linearly on a machine that wears out.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from decentral.config import Run
from decentral.fleet import Event, Fleet
from decentral.fleet.groups import Slowing, Stalls
from decentral.fleet.units import HOUR_S
from decentral.replica import seed_of
from decentral.task import Task

DRAWN_AHEAD = 512
"""Factors that are drawn for a worker at a time: each of ten thousand generators is out of the cache at its turn."""
NONE = np.empty(0)
FAR = 8.0
"""Standard deviations below its median that hardly any factor is: one in 10^15."""
ROUNDING = 1e-9
"""By which a sum of steps may fall short of so many times one step, relative to it."""


def fleet_of(run: Run, task: Task, parameters: int) -> Fleet:
    """Return the run's fleet with a step time in each group that has a device: FLOPs / (peak x mfu).

    FLOPs are `fleet.step_flops`, or 6 x parameters x tokens of a step: two for each parameter and token in the forward
    pass, four in the backward pass (Kaplan et al., 2020). Attention's own products are not in it.
    """
    if not any(group.mfu for group in run.fleet.workers):
        return run.fleet
    flops = run.fleet.step_flops or 6.0 * parameters * (task.tokens_per_sample or 0) * run.batch_size
    groups = [
        group.model_copy(update={"step_time_s": flops / (group.peak_flops * group.mfu)}) if group.mfu else group
        for group in run.fleet.workers
    ]
    return run.fleet.model_copy(update={"workers": tuple(groups)})


class Durations:
    """Says how long so many local steps take a worker that begins now."""

    def __init__(self, fleet: Fleet, seed: int, events: Iterable[Event], clock: Callable[[], float]) -> None:
        """`events` are those of single workers, of which "slow" ones count; `clock` returns the virtual time in s.

        Groups have a step time of their own or take the fleet's (`fleet_of` gives devices theirs).
        """
        groups = fleet.each()
        self._clock = clock
        self._step_time_s = [group.step_time_s or fleet.step_time_s for group in groups]
        self._speed = [group.speed for group in groups]
        self._sigma = [fleet.jitter if group.jitter is None else group.jitter for group in groups]
        self._chance = [np.random.default_rng(seed_of(seed, "jitter", worker)) for worker in range(fleet.size)]
        self._drawn: dict[int, tuple[np.ndarray[Any, np.dtype[np.float64]], int]] = {}  # and how many of them are used
        slow: dict[int, list[Event]] = {}
        for event in events:
            if event.kind == "slow" and event.worker is not None:
                slow.setdefault(event.worker, []).append(event)
        self._paces: dict[int, _Pace] = {}  # of those whose pace changes
        for worker, group in enumerate(groups):
            if worker in slow or group.slowing or group.stalls:
                pauses = _Pauses(group.stalls, seed_of(seed, "stall", worker)) if group.stalls else None
                self._paces[worker] = _Pace(slow.get(worker, []), group.slowing, pauses)

    def __call__(self, worker: int, steps: float) -> float:
        """Return the seconds from now until the worker has done `steps` local steps; a fraction is part of a step."""
        seconds = steps * self._step_time_s[worker] / self._speed[worker]
        sigma = self._sigma[worker]
        if sigma:
            whole = max(1, round(steps))
            seconds *= float(np.add.reduce(self._factors(worker, sigma, whole))) / whole
        pace = self._paces.get(worker)
        return seconds if pace is None else pace.seconds(self._clock(), seconds)

    def cut(self, worker: int, steps: int, began_s: float) -> tuple[int, float]:
        """Return how many of the `steps` that the worker began at `began_s` it has begun by now, and their seconds.

        These were the last steps that it was asked for. Those that it has not begun are as if they never had been.
        """
        elapsed_s, step_s = self._clock() - began_s, self._step_time_s[worker] / self._speed[worker]
        work_s = step_s * np.arange(1, steps + 1)
        if self._sigma[worker]:
            drawn, place = self._drawn[worker]
            work_s = step_s * np.cumsum(drawn[place - steps : place])
        pace = self._paces.get(worker)

        def end_s(index: int) -> float:
            return float(work_s[index]) if pace is None else pace.seconds(began_s, float(work_s[index]))

        begun = bisect_left(range(steps - 1), elapsed_s, key=end_s) + 1
        if self._sigma[worker]:
            self._drawn[worker] = drawn, place - (steps - begun)
        return begun, end_s(begun - 1)

    def shortest_step_s(self) -> float:
        """Return what hardly any local step of anybody takes less than, in seconds; without jitter and events none."""
        return (1 - ROUNDING) * min(
            step_time_s / speed * math.exp(-sigma * sigma / 2 - FAR * sigma)
            for step_time_s, speed, sigma in zip(self._step_time_s, self._speed, self._sigma, strict=True)
        )

    def _factors(self, worker: int, sigma: float, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the worker's next `count` factors, of mean 1: the same ones however many are drawn at a time."""
        drawn, place = self._drawn.get(worker, (NONE, 0))
        if place + count > len(drawn):
            more = self._chance[worker].lognormal(-sigma * sigma / 2, sigma, max(count, DRAWN_AHEAD))
            drawn, place = np.concatenate([drawn[place:], more]), 0
        self._drawn[worker] = drawn, place + count
        return drawn[place : place + count]


class _Pace:
    """One worker's pace over time: piecewise linear."""

    def __init__(self, slow: list[Event], slowing: Slowing | None, pauses: _Pauses | None) -> None:
        self._slow, self._slowing, self._pauses = slow, slowing, pauses
        edges = {event.at_s for event in slow} | {event.until_s for event in slow if event.until_s is not None}
        if slowing is not None:
            edges |= {slowing.from_s, slowing.ends_s}
        self._edges = sorted(edges)

    def seconds(self, begin_s: float, work_s: float) -> float:
        """Return how long work takes that takes `work_s` seconds at pace 1, when it begins at `begin_s`."""
        now = begin_s
        while True:
            end = self._next_edge(now)
            factor = self._factor(now)
            level, fall = self._level(now)
            length = end - now
            done = factor * (level - fall * length / 2) * length if length < math.inf else math.inf
            if factor and done >= work_s:
                need = work_s / factor  # of the integral of level - fall t; its smaller root, without cancellation:
                return now + 2 * need / (level + math.sqrt(max(level * level - 2 * fall * need, 0.0))) - begin_s
            work_s -= done
            now = end

    def _next_edge(self, now: float) -> float:
        place = bisect_right(self._edges, now)
        edge = self._edges[place] if place < len(self._edges) else math.inf
        return edge if self._pauses is None else min(edge, self._pauses.next_edge(now))

    def _factor(self, now: float) -> float:
        if self._pauses is not None and self._pauses.at(now):
            return 0.0
        factors = [event.factor or 1.0 for event in self._slow if event.at_s <= now < (event.until_s or math.inf)]
        return math.prod(factors)

    def _level(self, now: float) -> tuple[float, float]:
        """Return what wear has left, and how much of it is lost in a second from now on."""
        slowing = self._slowing
        if slowing is None or now < slowing.from_s:
            return 1.0, 0.0
        if now >= slowing.ends_s:
            return slowing.floor, 0.0
        fall = slowing.per_hour / HOUR_S
        return 1.0 - fall * (now - slowing.from_s), fall


class _Pauses:
    """One worker's pauses: drawn as far ahead as anybody has looked, the same however far that is."""

    def __init__(self, stalls: Stalls, seed: int) -> None:
        self._mean_gap_s, self._duration_s = HOUR_S / stalls.per_hour, stalls.duration_s
        self._chance = np.random.default_rng(seed)
        self._edges = [0.0]  # after an even number of edges the worker pauses

    def at(self, now: float) -> bool:
        """Say whether the worker pauses."""
        self._look_beyond(now)
        return bisect_right(self._edges, now) % 2 == 0

    def next_edge(self, now: float) -> float:
        """Return when a pause next begins or ends."""
        self._look_beyond(now)
        return self._edges[bisect_right(self._edges, now)]

    def _look_beyond(self, now: float) -> None:
        while self._edges[-1] <= now:
            begins = self._edges[-1] + float(self._chance.exponential(self._mean_gap_s))
            self._edges += [begins, begins + self._duration_s]
