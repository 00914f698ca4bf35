"""What decentral costs on top of a bare PyTorch loop, measured side by side in one run.

    python -m benchmarks.overhead

Three loops do the same local steps (byte GPT, batch 8, AdamW, gradient clipping, one thread), in turn, several times:
a bare PyTorch loop; a worker of `decentral train` on a local Ray, timed by its own journal; the whole of a simulation.
Printed are medians, the ratios to the bare loop of the same turn, and the ratio of the fastest turns. The bare loop and
the simulation are measured in CPU seconds, which others on the machine disturb least; the worker by its own clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from decentral.config import Run
from decentral.fleet import Fleet, WorkerGroup
from decentral.journal import Trained
from decentral.protocols import DiLoCo, Every
from decentral.sim.simulate import simulate
from decentral.workers.launch import train

STEPS = 40
REPLICAS = 2
TURNS = 5


def run_of(workers: int) -> Run:
    return Run(
        steps=STEPS,
        evaluate_every=0,
        rule=DiLoCo(period=Every(period=STEPS // 2)),
        fleet=Fleet(workers=(WorkerGroup(count=workers),)),
    )


def bare_loop(run: Run, worker: int = 0) -> float:
    """Return the seconds that `run.steps` steps take as anybody would write them."""
    task, inner = run.make_task(), run.inner
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=inner.lr, fused=True)
    began = time.process_time()
    for step in range(run.steps):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(worker, step * run.batch_size, run.batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.process_time() - began


def real_steps() -> float:
    """Return the seconds a worker on Ray spends in its local steps."""
    return sum(record.seconds for record in train(run_of(1)).records if isinstance(record, Trained))


def simulated() -> float:
    """Return the seconds that simulating `REPLICAS` workers takes, less the two evaluations of the model."""
    run = run_of(REPLICAS)
    began = time.process_time()
    simulate(run)
    whole = time.process_time() - began
    return whole - evaluations(run)


def evaluations(run: Run) -> float:
    task = run.make_task()
    model = task.model().eval()
    began = time.process_time()
    with torch.no_grad():
        for _ in range(2):
            task.evaluate(model)
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    turns: dict[str, list[float]] = {"bare": [], "real": [], "simulated": [], "bare x replicas": []}
    contenders: dict[str, Callable[[], float]] = {
        "bare": lambda: bare_loop(run_of(1)),
        "real": real_steps,
        "simulated": simulated,
        "bare x replicas": lambda: sum(bare_loop(run_of(1), worker) for worker in range(REPLICAS)),
    }
    for _ in range(TURNS):
        for name, contender in contenders.items():
            turns[name].append(contender())
    for name, seconds in turns.items():
        print(f"{name:16} {statistics.median(seconds):7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    for name, base in (("real", "bare"), ("simulated", "bare x replicas")):
        ratios = [mine / bare for mine, bare in zip(turns[name], turns[base], strict=True)]
        fastest = min(turns[name]) / min(turns[base])
        spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name} / {base}: {statistics.median(ratios):.3f}  {spread}, fastest turns {fastest:.3f}")


if __name__ == "__main__":
    main()
