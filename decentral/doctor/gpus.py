"""GPUs that the driver has, and whether torch sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from decentral.config import Run
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding

DRIVER = Path("/proc/driver/nvidia/gpus")
"""NVIDIA's driver has a folder for each GPU there."""


class GPUs(Check):
    name = "GPUs"

    def look(self, run: Run) -> Seen:
        count = torch.cuda.device_count()
        return {
            "driver": len(list(DRIVER.glob("*"))),
            "torch": [torch.cuda.get_device_name(index) for index in range(count)],
            "build": torch.__version__,
        }

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        for node, seen in nodes.items():
            if len(seen["torch"]) < seen["driver"]:
                yield self.problem(
                    f"{node}: the driver has {seen['driver']} GPUs, torch {seen['build']} sees {len(seen['torch'])}",
                    "install a torch that is built for this driver's CUDA, and look at CUDA_VISIBLE_DEVICES",
                )
        names = [name for seen in nodes.values() for name in seen["torch"]]
        wanted = (run.real.gpus or 0) * run.fleet.size
        if wanted > len(names):
            yield self.problem(
                f"the run wants {wanted:g} GPUs (real.gpus = {run.real.gpus:g} x {run.fleet.size} workers), torch sees "
                f"{len(names)}",
                "add nodes, or make real.gpus or the fleet smaller; where nodes come when asked for, ignore it",
            )
        elif names:
            yield self.ok(", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))))
        elif not any(seen["driver"] for seen in nodes.values()):
            yield self.ok("none: the run trains on CPUs")
