"""Whether the nodes can hold the run's workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from decentral.config import Run
from decentral.doctor import sizes
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding
from decentral.errors import TaskError
from decentral.pipeline.memory import memory_bytes

PROCESS_BYTES = 400 << 20
"""What a worker's process takes before it has a model: torch, Ray and gRPC."""
MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


class Memory(Check):
    name = "memory"

    def look(self, run: Run) -> Seen:
        if MEMINFO.exists():
            return {"available": available(MEMINFO.read_text(), GROUP)}
        return {"available": memory_bytes(torch.device("cpu"))}  # not Linux: all that the machine has

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        try:
            model = sizes.worker_bytes(run)
        except TaskError as error:
            yield self.problem(str(error), "see to the [task] of the run file")
            return
        each = model + PROCESS_BYTES
        places = sum(seen["available"] // each for seen in nodes.values())
        free = sizes.human(sum(seen["available"] for seen in nodes.values()))
        told = f"{run.fleet.size} workers of {sizes.human(each)} or more each, {free} available"
        if places < run.fleet.size:
            yield self.problem(told, "add nodes or memory, cut the model into pipeline.stages, or take fewer workers")
        elif places < 2 * run.fleet.size:
            yield self.warning(told, "activations, batches and what the rule keeps come on top: watch it")
        else:
            yield self.ok(told)


def available(meminfo: str, group: Path) -> int:
    """Return the bytes that may still be had, by what the kernel and the control group, if it limits us, say."""
    fields = dict(line.split(":") for line in meminfo.splitlines())
    free = 1024 * int(fields["MemAvailable"].split()[0])
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)
