"""What may befall the nodes of a Ray cluster: processes, lines, machines, clocks and the disk that they share.

It knows of the run only what an outsider can see: processes, and the checkpoints that they write.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from decentral.checkpoint import Storage, newest
from tests.chaos.clocks import Clocks
from tests.chaos.disk import Disk
from tests.worlds.fidelity.namespaces import Cluster

WORKER = "ray::Worker"
COORDINATOR = "ray::CoordinatorActor"
RAYLET = "raylet/raylet"
FROZEN_S = 20.0
"""Seconds that a process is frozen, and that pass until a machine comes back that has lost its raylet."""
NOTICE_S = 20
"""Seconds from a notice until the machine goes."""
STALLED_S = 2.0
"""Seconds that one is frozen which is to go on."""
CUT_S = 6.0
THIN_S = 6.0
FULL_MBIT, THIN_MBIT = 100.0, 1.0
SKEWED_S = 6.0
SKEW_S = 300
"""Seconds that a wall clock is ahead, or behind."""
DISK_FULL_S = 8.0
DEAD_NODE_S = 1.0
"""Seconds until a machine that has crashed is started again."""


class Mending(NamedTuple):
    """What makes a fault good, so many seconds after it."""

    after_s: float
    mend: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Site:
    """The nodes, their clocks, and the disk for checkpoints."""

    cluster: Cluster
    clocks: Clocks
    disk: Disk


class Faults:
    """Injects faults at a node; each method says how its fault is mended, if it does not mend itself.

    `checkpoints` is the run's folder on the disk. Of the times that it was full `torn` counts those in which a
    checkpoint was begun and not finished; `lost` says so if afterwards none was whole, or none so new as before.
    """

    def __init__(self, site: Site, checkpoints: Path) -> None:
        self.torn = 0
        self.lost: list[str] = []
        self._cluster, self._clocks, self._disk = site.cluster, site.clocks, site.disk
        self._checkpoints = Storage(str(checkpoints))

    def workers(self, node: int) -> list[int]:
        """Return the node's processes that are workers."""
        return self._processes(node, WORKER)

    # -- processes ---------------------------------------------------------------------------------------------------

    def kill(self, node: int) -> None:
        self._signal(node, WORKER, signal.SIGKILL)

    def kill_coordinator(self, node: int) -> None:
        self._signal(node, COORDINATOR, signal.SIGKILL)

    def freeze(self, node: int) -> Mending:
        return self._freeze(node, WORKER, FROZEN_S)

    def stall(self, node: int) -> Mending:
        return self._freeze(node, WORKER, STALLED_S)

    # -- Ray and machines --------------------------------------------------------------------------------------------

    def crash(self, node: int) -> Mending:
        self._cluster.crash(node)
        return Mending(DEAD_NODE_S, lambda: self._boot_anew(node))

    def kill_raylet(self, node: int) -> Mending:
        """The worker lives on for a while, though Ray counts its node for lost."""
        self._signal(node, RAYLET, signal.SIGKILL)
        return Mending(FROZEN_S, lambda: self._boot_anew(node))

    def freeze_raylet(self, node: int) -> Mending:
        return self._freeze(node, RAYLET, FROZEN_S)

    def drain(self, node: int) -> Mending:
        """Ray is told that the machine goes, and it goes."""
        for raylet in self._processes(node, RAYLET):
            (node_id,) = re.findall(r"--node_id=(\w+)", _command_line(raylet))
            self._cluster.drain(node_id, NOTICE_S)
        return Mending(NOTICE_S, lambda: self._boot_anew(node))

    def end_raylet(self, node: int) -> Mending:
        """Ray leaves the node with SIGTERM, as with `ray stop`, and takes its actors along; then the machine goes."""
        self._signal(node, RAYLET, signal.SIGTERM)
        return Mending(DEAD_NODE_S, lambda: self._boot_anew(node))

    # -- lines, clocks, disk -----------------------------------------------------------------------------------------

    def cut(self, node: int) -> Mending:
        self._cluster.cut(node)
        return Mending(CUT_S, lambda: self._cluster.heal(node))

    def thin(self, node: int) -> Mending:
        self._cluster.limit_node(node, THIN_MBIT)
        return Mending(THIN_S, lambda: self._cluster.limit_node(node, FULL_MBIT))

    def skew_ahead(self, node: int) -> Mending:
        self._clocks.skew(node, SKEW_S)
        return Mending(SKEWED_S, lambda: self._clocks.skew(node, 0))

    def skew_behind(self, node: int) -> Mending:
        self._clocks.skew(node, -SKEW_S)
        return Mending(SKEWED_S, lambda: self._clocks.skew(node, 0))

    def fill_disk(self, _node: int) -> Mending:
        """The disk is full, whichever node writes to it."""
        before = newest(self._checkpoints)
        self._disk.fill()

        def clear() -> None:
            after = newest(self._checkpoints)
            self._disk.clear()
            self.torn += bool(after and after.passed_over)
            if before and (after is None or after.folder < before.folder):
                self.lost.append(
                    f"{after.folder if after else 'no checkpoint'} was left, {before.folder} had been there"
                )

        return Mending(DISK_FULL_S, clear)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _boot_anew(self, node: int) -> None:
        """Start the node's machine again. Ray gives up if it is not up in its own time, so it may take another try."""
        for _try in range(2):
            self._cluster.crash(node)
            with contextlib.suppress(subprocess.SubprocessError):
                self._cluster.boot(node)
                return
        self._cluster.crash(node)
        self._cluster.boot(node)

    def _freeze(self, node: int, title: str, seconds: float) -> Mending:
        pids = self._signal(node, title, signal.SIGSTOP)
        return Mending(seconds, lambda: _send(pids, signal.SIGCONT))

    def _signal(self, node: int, title: str, number: signal.Signals) -> list[int]:
        pids = self._processes(node, title)
        _send(pids, number)
        return pids

    def _processes(self, node: int, title: str) -> list[int]:
        """Return the node's processes that have `title` in their command line."""
        return [pid for pid in self._cluster.pids(node) if title in _command_line(pid)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""  # it has ended


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
