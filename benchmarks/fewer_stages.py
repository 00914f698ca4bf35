"""A pipeline that loses a machine for good goes on with fewer stages: what it does over, what moves, how long it takes.

    python -m benchmarks.fewer_stages [--stage 1] [--width 384]      (half a minute)

A byte GPT of eight blocks is cut into four stages on a local Ray of four places; a stage is killed, and its place taken
by somebody else. Redundant copies bring it back to the bit beside another worker; then the model is cut into three.
Printed are seconds from the kill on, by the journal, and what of the state has gone from one worker to another.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import tempfile
from typing import Any

import ray
import ray._private.state

from decentral.config import validated
from decentral.journal import Joined, Left, Rebuilt, Record, Trained
from decentral.workers.launch import train
from decentral.workers.places import Spare

STAGES = 4
PERIOD = 5
KILLED_AT = 20
"""Local steps after which the stage is killed."""
STEPS = 60
PATIENCE_S = 2.0


def pid_of(worker: int) -> int:
    """Return the process of a worker in its first life."""
    (pid,) = (
        fields["Pid"]
        for fields in ray._private.state.actors().values()
        if fields["State"] == "ALIVE" and fields["Name"].endswith(f"worker-{worker}")
    )
    return int(pid)


def first(records: list[Record], kind: type[Record], after_s: float) -> float:
    """Return when the first record of that kind was made after that time."""
    return min(record.time_s for record in records if isinstance(record, kind) and record.time_s > after_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, choices=range(STAGES), default=1)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("decentral").setLevel(logging.INFO)
    others = list[Any]()
    struck = list[int]()
    trained = list[int]()  # by worker 0, also what the journal does not keep

    def see(record: Record) -> None:
        if not others:  # all are there: the next place is for somebody else
            others.append(ray.remote(Spare).options(num_cpus=1).remote())
            others.append(others[0].placed.remote())
        if isinstance(record, Trained) and record.worker == 0:
            trained.append(record.steps)
        if isinstance(record, Trained) and record.step >= KILLED_AT and not struck:
            struck.append(pid_of(options.stage))
            os.kill(struck[0], signal.SIGKILL)

    with tempfile.TemporaryDirectory() as folder:
        run = validated(
            {
                "steps": STEPS,
                "batch_size": 4,
                "evaluate_every": 0,
                "patience_s": PATIENCE_S,
                "task": {"name": "byte_gpt", "width": options.width, "depth": 8, "context": 64},
                "inner": {"name": "adamw", "lr": 1e-3},
                "rule": {"name": "diloco", "period": PERIOD},
                "pipeline": {"stages": STAGES, "least": 2, "microbatches": 4, "recovery": "redundant"},
                "fleet": {"workers": [{"count": STAGES}]},
                "checkpoint": {"url": folder, "every_s": 3600.0},
            },
            "fewer_stages",
        )
        ray.init(num_cpus=STAGES, include_dashboard=False, log_to_driver=False)
        outcome = train(run, on_record=see)
        ray.shutdown()
    records = list(outcome.records)
    (crashed,) = (record.time_s for record in records if isinstance(record, Left) and record.reason == "crashed")
    left = first([record for record in records if getattr(record, "reason", "").startswith("cut")], Left, crashed)
    anew = first(records, Joined, left)
    steps = [record.step for record in records if isinstance(record, Trained) and record.worker == 0]
    assert steps == list(range(PERIOD, STEPS + 1, PERIOD)), steps  # every step once
    for what, at in {
        "somebody else begins beside another worker": first(records, Joined, crashed),
        "the stage is back there": first(records, Rebuilt, crashed),
        "the row has trained": first(records, Trained, crashed),
        "all leave": left,
        "three stages are there": anew,
        "they have trained": first(records, Trained, anew),
    }.items():
        print(f"{at - crashed:6.2f} s  {what}")
    print(f"local steps of whole phases done over: {sum(trained) - STEPS}")


if __name__ == "__main__":
    main()
