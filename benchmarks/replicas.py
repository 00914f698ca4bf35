"""Simulated training of many small replicas, beside bare torch loops over as many in this process and in two.

Run from the repository's root (about twelve minutes on two cores):

    python -m benchmarks.replicas

Every variant trains the same number of replicas for as many steps: `bare loop` in one process with one thread,
`bare x2` in two processes with one thread each and half the replicas, `simulate` under DiLoCo with one round, as a run
file's default computes it. Variants take turns; printed are medians of seconds on the clock, of CPU seconds over all
processes, and of both as ratios to the better bare loop of the same turn, for a shared machine changes its speed from
turn to turn. On a machine with other work to do, believe the CPU seconds.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from decentral.config import Run, validated
from decentral.sim.simulate import simulate
from decentral.tasks.text import ByteGPT

REPEATS = 5
REPLICAS = 32
BATCH = 8
CASES: tuple[tuple[dict[str, Any], int], ...] = (  # model, steps
    ({"width": 128, "depth": 4, "heads": 4, "context": 128}, 10),
    ({"width": 32, "depth": 2, "heads": 2, "context": 32}, 300),
)


def train_bare(model: dict[str, Any], workers: Sequence[int], steps: int) -> None:
    """Train a replica for each worker with torch alone, one after the other, one thread."""
    torch.set_num_threads(1)
    task = ByteGPT(**model)
    for worker in workers:
        torch.manual_seed(0)
        replica = task.model()
        optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3, fused=True)
        for step in range(steps):
            optimizer.zero_grad(set_to_none=False)
            loss = task.loss(replica, task.batch(worker, step * BATCH, BATCH))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
            optimizer.step()


def train_bare_in_two(model: dict[str, Any], steps: int) -> None:
    """The same in two processes, each with half the replicas."""
    children = []
    for half in (range(0, REPLICAS, 2), range(1, REPLICAS, 2)):
        child = os.fork()
        if not child:
            train_bare(model, half, steps)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def make_run(model: dict[str, Any], steps: int) -> Run:
    """Return the same work as a simulated run with one round."""
    table = {
        "steps": steps,
        "batch_size": BATCH,
        "evaluate_every": 0,
        "task": {"name": "byte_gpt", **model, "eval_windows": 8},
        "inner": {"name": "adamw", "clip_norm": 1.0},
        "rule": {"name": "diloco", "period": steps},
        "fleet": {"workers": [{"count": REPLICAS}]},
    }
    return validated(table, "benchmark")


def cpu_s() -> float:
    """Return the CPU seconds of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds on the clock and the CPU seconds that the work takes."""
    began, cpu_before = time.perf_counter(), cpu_s()
    work()
    return time.perf_counter() - began, cpu_s() - cpu_before


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'model':<28}{'variant':<14}{'seconds':>9}{'CPU s':>9}{'ratio':>8}{'spread':>14}{'CPU ratio':>11}")
    for model, steps in CASES:
        run = make_run(model, steps)
        variants: dict[str, Callable[[], object]] = {
            "bare loop": lambda model=model, steps=steps: train_bare(model, range(REPLICAS), steps),  # type: ignore[misc]
            "bare x2": lambda model=model, steps=steps: train_bare_in_two(model, steps),  # type: ignore[misc]
            "simulate": lambda run=run: simulate(run),  # type: ignore[misc]
        }
        turns = [{name: measured(work) for name, work in variants.items()} for _ in range(REPEATS)]
        label = f"GPT d={model['width']}, {REPLICAS} replicas"
        for name in variants:
            seconds, cpu = (statistics.median(turn[name][column] for turn in turns) for column in (0, 1))
            ratios, cpu_ratios = ([turn[name][column] / best(turn, column) for turn in turns] for column in (0, 1))
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"{label:<28}{name:<14}{seconds:>9.2f}{cpu:>9.2f}{statistics.median(ratios):>8.2f}{spread:>14}"
                f"{statistics.median(cpu_ratios):>11.2f}"
            )


def best(turn: Mapping[str, tuple[float, float]], column: int) -> float:
    """Return what the better bare loop of a turn took: seconds on the clock, or CPU seconds (`column` 1)."""
    return min(turn[name][column] for name in ("bare loop", "bare x2"))


if __name__ == "__main__":
    main()
