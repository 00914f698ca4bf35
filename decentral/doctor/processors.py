"""Whether there are cores for the run's threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from decentral.config import Run
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding


class Processors(Check):
    name = "processors"

    def look(self, run: Run) -> Seen:
        return {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        cores, wanted = sum(seen["cores"] for seen in nodes.values()), run.fleet.size * run.real.threads
        if wanted > cores:
            yield self.warning(
                f"{run.fleet.size} workers x {run.real.threads} threads share {cores} cores",
                "steps take longer than on machines of their own: add nodes, or make fleet or real.threads smaller",
            )
        else:
            yield self.ok(f"{cores} cores for {wanted} threads")
        for node, seen in nodes.items():
            if seen["load"] > seen["cores"] / 2:
                yield self.warning(
                    f"{node} is busy: {seen['load']:.1f} processes run on its {seen['cores']} cores",
                    "end what else runs there, or the run waits for it",
                )
