"""A storm over a real Ray cluster, whose nodes are network namespaces: what befalls processes, lines and machines.

It knows of the run only what an outsider can see: processes, and what witnesses have written.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.witness import sights
from tests.worlds.fidelity.namespaces import Cluster

WORKER = "ray::Worker"
COORDINATOR = "ray::CoordinatorActor"
RAYLET = "raylet/raylet"
FRESH_S = 2.0
"""Who has rested after a round within so many seconds takes part."""
SPARED = 2
"""Workers that must be left when others are struck: a run whose last member is gone is over."""
PAUSE_S = 1.0
"""Seconds between two faults, on average."""
FROZEN_S = 20.0
"""Seconds that a process is frozen, and that pass until a machine comes back that was drained or lost its raylet."""
CUT_S = 6.0
THIN_S = 6.0
FULL_MBIT, THIN_MBIT = 100.0, 1.0
DEAD_NODE_S = 1.0
"""Seconds until a machine that has crashed is started again."""
STILL_S = 120.0
"""A run in which nobody has rested after a round for so long hangs."""
LOOK_S = 0.1


class Hang(AssertionError):
    """Nothing has moved for too long."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault, and when it was injected, by this machine's monotonic clock."""

    at_s: float
    fault: str
    node: int


class NodeStorm:
    """Strikes nodes `1 .. count` while a run trains on them. The seed draws which faults, where and when."""

    def __init__(self, cluster: Cluster, count: int, folder: Path, seed: int) -> None:
        self.struck: list[Struck] = []
        self._cluster, self._nodes, self._folder, self._seed = cluster, range(1, count + 1), folder, seed
        self._draw = random.Random(seed)
        self._ill: set[int] = set()  # nodes that are not to be struck again before they are well
        self._mending: list[threading.Thread] = []
        self._faults: dict[str, Callable[[int], None]] = {
            "kill a worker": self._kill,
            "kill a worker again": self._kill,
            "freeze a worker": self._freeze,
            "crash a node": self._crash,
            "kill a raylet": self._kill_raylet,
            "freeze a raylet": self._freeze_raylet,
            "drain a node": self._drain,
            "cut a line": self._cut,
            "thin a line": self._thin,
            "kill the coordinator": self._kill_coordinator,
        }

    def pass_over(self, training: subprocess.Popen[bytes], rounds: int) -> None:
        """Strike until somebody has got through so many rounds, then wait for the run's end. Raises `Hang`."""
        try:
            while training.poll() is None and self._round() < rounds:
                self._wait(training, self._draw.uniform(0, 2 * PAUSE_S))
                well = self._well()
                if well:
                    self._strike(self._draw.choice(list(self._faults)), self._draw.choice(well))
            while training.poll() is None:
                self._wait(training, LOOK_S)
        finally:
            for mending in self._mending:
                mending.join()

    def _strike(self, fault: str, node: int) -> None:
        self.struck.append(Struck(time.monotonic(), fault, node))
        with (self._folder / "struck").open("a") as file:
            print(self.struck[-1], file=file)
        self._ill.add(node)
        self._faults[fault](node)

    def _well(self) -> list[int]:
        """Return nodes with a worker that takes part; none if too few would be left without one of them."""
        now = time.time()
        seen = {
            int(file.stem.partition("-")[2])
            for file in self._folder.glob("*.seen")
            if now - file.stat().st_mtime < FRESH_S
        }
        well = [node for node in self._nodes if node not in self._ill and seen & set(self._processes(node, WORKER))]
        return well if len(well) > SPARED else []

    def _round(self) -> int:
        return max((sight.round for sight in sights(self._folder)), default=0)

    def _wait(self, training: subprocess.Popen[bytes], seconds: float) -> None:
        time.sleep(seconds)
        newest = max((file.stat().st_mtime for file in self._folder.glob("*.seen")), default=time.time())
        if time.time() - newest > STILL_S and training.poll() is None:
            last = "\n".join(f"{struck.at_s:.1f} {struck.fault}, node {struck.node}" for struck in self.struck[-10:])
            raise Hang(f"seed {self._seed}: no round for {STILL_S:g} s after\n{last}")

    def _later(self, seconds: float, mend: Callable[[], object], node: int) -> None:
        """Mend in so many seconds, whatever happens; then the node may be struck again."""

        def wait_and_mend() -> None:
            time.sleep(seconds)
            mend()
            self._ill.discard(node)

        thread = threading.Thread(target=wait_and_mend)
        thread.start()
        self._mending.append(thread)

    # -- faults ------------------------------------------------------------------------------------------------------

    def _kill(self, node: int) -> None:
        self._signal(node, WORKER, signal.SIGKILL)
        self._ill.discard(node)

    def _freeze(self, node: int) -> None:
        pids = self._signal(node, WORKER, signal.SIGSTOP)
        self._later(FROZEN_S, lambda: _send(pids, signal.SIGCONT), node)

    def _crash(self, node: int) -> None:
        self._cluster.crash(node)
        self._later(DEAD_NODE_S, lambda: self._cluster.boot(node), node)

    def _kill_raylet(self, node: int) -> None:
        """The worker lives on for a while, though Ray counts its node for lost."""
        self._signal(node, RAYLET, signal.SIGKILL)

        def boot() -> None:
            self._cluster.crash(node)
            self._cluster.boot(node)

        self._later(FROZEN_S, boot, node)

    def _freeze_raylet(self, node: int) -> None:
        pids = self._signal(node, RAYLET, signal.SIGSTOP)
        self._later(FROZEN_S, lambda: _send(pids, signal.SIGCONT), node)

    def _drain(self, node: int) -> None:
        """A node that gets SIGTERM is drained for 30 s; then its machine goes."""
        self._signal(node, RAYLET, signal.SIGTERM)

        def boot() -> None:
            self._cluster.crash(node)
            self._cluster.boot(node)

        self._later(FROZEN_S, boot, node)

    def _cut(self, node: int) -> None:
        self._cluster.cut(node)
        self._later(CUT_S, lambda: self._cluster.heal(node), node)

    def _thin(self, node: int) -> None:
        self._cluster.limit_node(node, THIN_MBIT)
        self._later(THIN_S, lambda: self._cluster.limit_node(node, FULL_MBIT), node)

    def _kill_coordinator(self, node: int) -> None:
        self._signal(0, COORDINATOR, signal.SIGKILL)
        self._ill.discard(node)

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
