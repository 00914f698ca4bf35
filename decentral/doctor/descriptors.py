"""How many files and connections a process may have open."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping

from decentral.config import Run
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding

BASE = 256
"""What a worker's process has open besides connections to other workers."""
FOR_EACH_PEER = 4
ENOUGH_FOR_RAY = 4096
"""Ray's own processes have connections to each worker of the cluster, and warn below this."""


class Descriptors(Check):
    name = "open files"

    def look(self, run: Run) -> Seen:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {"soft": _number(soft), "hard": _number(hard)}

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        wanted = BASE + FOR_EACH_PEER * run.fleet.size
        for node, seen in nodes.items():
            advice = f"`ulimit -n {max(2 * wanted, 65536)}` before Ray or your loop starts there"
            told = f"{node}: a process may have {seen['soft']} files open"
            if seen["soft"] < wanted:
                yield self.problem(f"{told}; a worker among {run.fleet.size} has up to {wanted}", advice)
            elif seen["soft"] < ENOUGH_FOR_RAY:
                yield self.warning(f"{told}, too few for Ray on a large machine", advice)
            else:
                yield self.ok(told)


def _number(limit: int) -> int:
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit
