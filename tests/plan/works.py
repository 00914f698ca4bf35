"""Small works for plans."""

from __future__ import annotations

from typing import Any

from decentral.config import validated
from decentral.plan import Work, work_of

STACK = {"name": "layer_stack", "layers": 6, "parameters": 6e4, "tokens": 16}
UNEQUAL = [{"count": 2}, {"speed": 0.5, "up_bps": 5e5}]


def work(
    workers: Any = 2, steps: int = 600, task: dict[str, Any] | None = None, batch_size: int = 1, **fleet: Any
) -> Work:
    """Return so many local steps of each of some workers (a number, or groups) on lines of 1 Mbit/s."""
    groups = [{"count": workers}] if isinstance(workers, int) else workers
    lines = {"up_bps": 1e6, "down_bps": 1e6, "latency_s": 0.0, "step_time_s": 1.0}
    table = {
        "steps": steps,
        "batch_size": batch_size,
        "task": task or STACK,
        "inner": {"name": "sgd", "lr": 0.1},
        "fleet": {**lines, "workers": groups, **fleet},
    }
    return work_of(validated(table, "test"))
