"""How long a fast worker waits for a slow one, with equally long phases and with phases that fit the workers' speeds.

    python -m benchmarks.straggler            # simulated; some minutes
    python -m benchmarks.straggler --real     # the first fleet on a local Ray; three minutes

The first fleet is that of a measurement of torchft: two workers whose steps take 20 and 100 ms, DiLoCo. Given the same
number of local steps, the fast one waits four fifths of its time by arithmetic alone; torchft has seen 73 %. Then eight
workers of log-normal speeds whose steps jitter. Then what it does to the model: a byte GPT on the first fleet, by the
clock and by samples. A worker's share is of the time until it has done its own steps; no table leaves out the first
phases, in which speeds are not known yet.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from typing import NamedTuple

from decentral.config import Run
from decentral.fleet import Event, Fleet, WorkerGroup
from decentral.inner import AdamW
from decentral.journal import Evaluated, Trained
from decentral.outcome import Outcome
from decentral.protocols import DiLoCo, DyLU, Every, Nesterov, NoLoCo, Schedule, SyncRule, Timed
from decentral.sim.simulate import simulate

STEP_S = 0.02
STRAGGLER = (1.0, 0.2)
"""Speeds of two workers whose steps take 20 and 100 ms."""
PERIOD = 100
SCHEDULES: dict[str, Schedule] = {
    "equal H": Every(period=PERIOD),
    "dylu": DyLU(period=PERIOD),
    "timed": Timed(seconds=PERIOD * STEP_S),
}
PACED = {"name": "benchmarks.recovery:Paced", "dimension": 250_000}
"""Its steps take `STEP_S` and next to no computing, so that two workers do not slow each other down."""
SMALL_GPT = {"name": "byte_gpt", "width": 64, "depth": 2, "heads": 2, "context": 64}


def run_of(rule: SyncRule, speeds: Iterable[float], steps: int, jitter: float = 0.0) -> Run:
    fleet = Fleet(
        workers=tuple(WorkerGroup(speed=speed) for speed in speeds),
        step_time_s=STEP_S,
        jitter=jitter,
        latency_s=0.005,
        up_bps=1e9,
        down_bps=1e9,
    )
    return Run(rule=rule, steps=steps, evaluate_every=0, task=SMALL_GPT, fleet=fleet)


def waits(outcome: Outcome) -> list[float]:
    """Return the share of its time in the run that each worker did not compute, by worker."""
    return [1 - left.seconds["compute"] / sum(left.seconds.values()) for left in outcome.left()]


def print_waits(title: str, rule: type[DiLoCo] | type[NoLoCo], speeds: tuple[float, ...], jitter: float = 0.0) -> None:
    fastest = max(range(len(speeds)), key=speeds.__getitem__)
    print(f"\n{title}: share of its time that the fastest worker does not compute, in 2000 of its steps")
    for name, schedule in SCHEDULES.items():
        outcome = simulate(run_of(rule(period=schedule), speeds, 2000, jitter), timing_only=True)
        print(f"  {name:8} {waits(outcome)[fastest]:6.1%}")


class Point(NamedTuple):
    """The model that the first worker had at a round's end: by then so many samples of all workers were in it."""

    time_s: float
    samples: int
    bits: float


def curve(schedule: Schedule, weighted: bool, seconds: float) -> list[Point]:
    """Return the model's way in a run of two unequal workers that the slow one leaves when the fast one has ended."""
    per_step_s = STEP_S / (STRAGGLER[1] if schedule.equal else STRAGGLER[0])
    run = run_of(
        DiLoCo(period=schedule, weighted=weighted, outer=Nesterov(lr=1.0, momentum=0.5)),
        STRAGGLER,
        round(seconds / per_step_s),
    )
    end = (Event(at_s=seconds * 1.05, worker=1),)
    fields = {**run.to_fields(), "evaluate_every": 1, "inner": AdamW(lr=2e-3, warmup_steps=20, clip_norm=1.0)}
    outcome = simulate(Run(**{**fields, "fleet": run.fleet.model_copy(update={"events": end})}))
    points, samples = [], 0
    for record in outcome.records:
        if isinstance(record, Trained):
            samples += record.samples
        elif isinstance(record, Evaluated):
            points.append(Point(record.time_s, samples, record.metrics["bits_per_byte"]))
    return points


def print_losses(seconds: float) -> None:
    curves = {
        "equal H = 20": curve(Every(period=20), False, seconds),
        "dylu H = 20": curve(DyLU(period=20), False, seconds),
        "dylu H = 20, by samples": curve(DyLU(period=20), True, seconds),
        "dylu H = 50": curve(DyLU(period=50), False, seconds),
        "timed 2 s": curve(Timed(seconds=2.0), False, seconds),
    }
    samples = min(points[-1].samples for points in curves.values())
    print(f"\nByte GPT, 20 and 100 ms: bits per byte after {seconds:g} s, and after {samples} samples of both workers")
    for name, points in curves.items():
        then = next(point for point in points if point.samples >= samples)
        last = points[-1]
        print(f"  {name:24} {last.bits:.3f} ({last.samples} samples)   {then.bits:.3f} ({then.time_s:.1f} s)")


def share_later(outcome: Outcome, worker: int) -> float:
    """Return the share of its time that a worker does not compute, from its third phase to its last."""
    trained = [record for record in outcome.records if isinstance(record, Trained) and record.worker == worker][2:]
    began_s = trained[0].time_s - trained[0].seconds
    return 1 - sum(record.seconds for record in trained) / (trained[-1].time_s - began_s)


def print_real() -> None:
    """Two rounds show what equal phases cost; ten with their beginning and end, what the others do."""
    from decentral.workers.launch import train  # Ray, which the simulations do without

    print(f"On Ray, a step's pause of {STEP_S} s, the second worker slowed down to a fifth: share not computing")
    for name, steps in (("equal H", 2 * PERIOD), ("dylu", 10 * PERIOD)):
        run = run_of(DiLoCo(period=SCHEDULES[name]), STRAGGLER, steps)
        outcome = train(Run(**{**run.to_fields(), "task": PACED, "batch_size": 1}))
        trained = [record for record in outcome.records if isinstance(record, Trained)]
        phases = [[record.steps for record in trained if record.worker == worker][:8] for worker in (0, 1)]
        fast, slow = waits(outcome)
        later = f", from its third phase on {share_later(outcome, 0):.1%}" if len(phases[0]) > 2 else ""
        print(f"  {name:8} fast {fast:.1%}{later}; slow {slow:.1%}")
        print(f"           first phases {phases[0]} and {phases[1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", action="store_true", help="train on a local Ray, and simulate nothing")
    if parser.parse_args().real:
        print_real()
        return
    print_waits("DiLoCo, 20 and 100 ms", DiLoCo, STRAGGLER)
    chance = random.Random(0)
    drawn = [chance.lognormvariate(0, 0.5) for _ in range(8)]
    eight = tuple(speed / max(drawn) for speed in drawn)
    print_waits("DiLoCo, eight log-normal speeds (sigma 0.5), steps that jitter (0.2)", DiLoCo, eight, 0.2)
    print_waits("NoLoCo, the same eight", NoLoCo, eight, 0.2)
    print_losses(seconds=40.0)


if __name__ == "__main__":
    main()
