"""Train one PyTorch model on machines that are far apart, unequal and may vanish; simulate it first; compare rules.

The names below are the public ones. `decentral.protocols` has all rules and their parts, `decentral.tasks` the built-in
tasks. `train` is imported when it is first used: it brings Ray with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decentral.config import Run, read_run
from decentral.errors import ConfigError, DecentralError, PeerGone, RunError, TaskError
from decentral.outcome import Outcome
from decentral.part import Part
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.protocols.collectives import all_gather, exchange
from decentral.protocols.rounds import Round, agreed_mean
from decentral.sim.simulate import simulate
from decentral.task import Task

if TYPE_CHECKING:
    from decentral.workers.launch import train

__all__ = [
    "ConfigError",
    "DecentralError",
    "Outcome",
    "Part",
    "Peer",
    "PeerGone",
    "Round",
    "Run",
    "RunError",
    "SyncRule",
    "Task",
    "TaskError",
    "agreed_mean",
    "all_gather",
    "exchange",
    "read_run",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":
        from decentral.workers.launch import train

        return train
    raise AttributeError(f"module 'decentral' has no attribute '{name}'")
