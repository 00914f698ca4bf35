"""What checkpoints cost: training time that each one takes from two workers on a real Ray on this machine.

    python -m benchmarks.checkpoint_cost [--parameters 25000000] [--checkpoints 6]

Workers train with DiLoCo under AdamW, 20 bytes of state a parameter, one thread each, so that on two cores none is idle
for hashing and writing. A checkpoint is taken every `EVERY_S`; of each the rounds within `AFTER_S` from when the states
were taken are compared with the other rounds of the same run. What they took longer is the checkpoint's cost; divided
by a minute it is the share of throughput that one a minute costs. What copying, hashing and writing a worker's share
take by themselves is printed below, in seconds of one core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.memory import Wide
from decentral.checkpoint import Storage
from decentral.checkpoint.archive import write_share
from decentral.checkpoint.contents import describe
from decentral.checkpoint.manifest import Manifest
from decentral.checkpoint.plan import plan
from decentral.config import Run, validated
from decentral.journal import Record, Synced
from decentral.snapshot import Life, Snapshot
from decentral.workers.buffers import prepare_memory
from decentral.workers.launch import train

WORKERS = 2
BATCH = 64
PERIOD = 4
EVERY_S = 20.0
AFTER_S = 8.0
WARM_S = 5.0
"""Seconds at the start of a run that are not counted."""
REPEATS = 5
BYTES = 2 * 4 + 3 * 4
"""Of a worker's state for each parameter: AdamW's means; parameters, anchor and outer momentum."""


class Batched(Wide):
    """Square layers on batches of many samples: as much arithmetic for each parameter as training usually is."""

    name: ClassVar[str] = ""

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        return torch.ones(size, self.width)


class Round(NamedTuple):
    """One round of a worker: from the end of the last one to its own, in seconds since the run began."""

    began_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


def rounds_of(worker: int, records: Iterable[Record]) -> list[Round]:
    ends = [record.time_s for record in records if isinstance(record, Synced) and record.worker == worker]
    return [Round(*ends) for ends in pairwise(ends) if ends[0] > WARM_S]


def costs(rounds: list[Round], taken_s: list[float]) -> tuple[float, list[float]]:
    """Return how long a round takes beside no checkpoint, and what each of these checkpoints added in all, in s."""
    during = [[each for each in rounds if at <= each.ended_s and each.began_s <= at + AFTER_S] for at in taken_s]
    touched = {each for some in during for each in some}
    quiet_s = statistics.mean(each.seconds for each in rounds if each not in touched)
    return quiet_s, [sum(each.seconds - quiet_s for each in some) for some in during]


def measure(parameters: int, checkpoints: int) -> tuple[list[Record], list[Manifest]]:
    """Train for so many checkpoints; return the records and what was kept."""
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def see(record: Record) -> None:
            records.append(record)
            if len(list(folder.glob("*/manifest.json"))) > checkpoints:  # the last one's rounds may not be over
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            train(run_of(parameters, name), on_record=see)
        manifests = [Manifest.model_validate_json(path.read_text()) for path in folder.glob("*/manifest.json")]
    return records, sorted(manifests, key=lambda manifest: manifest.number)[:checkpoints]


def run_of(parameters: int, folder: str) -> Run:
    return validated(
        {
            "steps": 1_000_000,
            "batch_size": BATCH,
            "evaluate_every": 0,
            "task": {"name": "benchmarks.checkpoint_cost:Batched", "parameters": parameters},
            "rule": {"name": "diloco", "period": PERIOD},
            "inner": {"name": "adamw", "lr": 1e-5},
            "fleet": {"workers": [{"count": WORKERS}]},
            "checkpoint": {"url": folder, "every_s": EVERY_S, "keep": 1000},
        },
        "benchmark",
    )


def alone(parameters: int) -> dict[str, float]:
    """Return the seconds of one core that copying, hashing and writing take of one worker's state, by themselves."""
    prepare_memory()
    names = ("params", "slot anchor", "slot momentum", "inner mean", "inner variance")
    live = {name: torch.randn(parameters) for name in names}
    life = Life(0.0, 0, 0, 0, 0, False, (), {}, 0, 0, 0)
    spent: dict[str, list[float]] = {"copy": [], "hash": [], "write": []}
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        copies = {name: values.clone() for name, values in live.items()}
        for number in range(REPEATS):
            moments = [time.process_time()]
            for name, values in live.items():  # into what the last checkpoint has left
                copies[name].copy_(values)
            moments.append(time.process_time())
            snapshot = Snapshot(0, {}, copies, life)
            described = describe(0, snapshot)
            moments.append(time.process_time())
            write_share(storage, str(number), snapshot, described, plan({0: described})[0][::WORKERS])
            moments.append(time.process_time())
            for seconds, (began, ended) in zip(spent.values(), pairwise(moments), strict=True):
                seconds.append(ended - began)
    return {what: statistics.median(seconds) for what, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--checkpoints", type=int, default=6)
    options = parser.parse_args()
    records, manifests = measure(options.parameters, options.checkpoints)
    console = Console()
    console.print(f"{WORKERS} workers of {BYTES * options.parameters / 1e9:.2f} GB each, {len(manifests)} checkpoints")
    for worker in range(WORKERS):
        taken_s = [manifest.workers[worker].life.time_s for manifest in manifests]
        quiet_s, added_s = costs(rounds_of(worker, records), taken_s)
        each_s = statistics.mean(added_s)
        rate = PERIOD * BATCH / quiet_s
        console.print(
            f"worker {worker}: {rate:.1f} samples/s without; a checkpoint costs {each_s:.2f} s "
            f"({min(added_s):.2f} to {max(added_s):.2f}); one a minute: {rate * (1 - each_s / 60):.1f} samples/s, "
            f"{each_s / 60:.2%} less"
        )
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # as a worker is: its memory comes in large pages
        spent = fresh.submit(alone, options.parameters).result()
    for what, seconds in spent.items():
        console.print(f"{what}: {seconds:.2f} s of one core")


if __name__ == "__main__":
    main()
