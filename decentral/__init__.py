"""Train one PyTorch model on machines that are far apart, unequal and may vanish; simulate it first; compare rules.

The names below are the public ones. `decentral.protocols` has all rules and their parts, `decentral.tasks` the built-in
tasks. Each name is imported when it is first used: a process that needs neither torch nor Ray does not wait for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decentral.config import Run, read_run
    from decentral.embedded.join import join
    from decentral.errors import ConfigError, DecentralError, PeerGone, RunError, TaskError
    from decentral.outcome import Outcome
    from decentral.part import Part
    from decentral.peer import Peer
    from decentral.protocols.collectives import all_gather, exchange
    from decentral.protocols.rounds import Round, agreed_mean
    from decentral.protocols.rule import SyncRule
    from decentral.sim.simulate import simulate
    from decentral.task import Task
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
    "join",
    "read_run",
    "simulate",
    "train",
]

_HOMES = {
    "config": ("Run", "read_run"),
    "embedded.join": ("join",),
    "errors": ("ConfigError", "DecentralError", "PeerGone", "RunError", "TaskError"),
    "outcome": ("Outcome",),
    "part": ("Part",),
    "peer": ("Peer",),
    "protocols.collectives": ("all_gather", "exchange"),
    "protocols.rounds": ("Round", "agreed_mean"),
    "protocols.rule": ("SyncRule",),
    "sim.simulate": ("simulate",),
    "task": ("Task",),
    "workers.launch": ("train",),
}
_HOME_OF = {name: f"decentral.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'decentral' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
