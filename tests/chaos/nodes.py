"""A storm over a real Ray cluster, whose nodes are network namespaces: it draws what befalls which node, and when."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from decentral.journal import Settled
from tests.chaos.faults import Faults, Mending
from tests.chaos.follow import Follower
from tests.chaos.witness import worker_process

FRESH_S = 2.0
"""Who has rested after a round within so many seconds takes part."""
SPARED = 2
"""Workers that must be left when others are struck: a run whose last member is gone is over."""
PAUSE_S = 1.0
"""Seconds between two blows, on average."""
AT_ONCE = 3
"""Faults of one blow, at the most."""
STILL_S = 120.0
"""A run in which nobody has rested after a round for so long hangs."""
LOOK_S = 0.1
HEAD, DISK = 0, -1
"""Where the coordinator is, and what stands for the disk among the nodes."""


class Hang(AssertionError):
    """Nothing has moved for too long."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault, and when it was injected, by this machine's monotonic clock."""

    at_s: float
    fault: str
    node: int


class NodeStorm:
    """Strikes nodes `1 .. count` while a run of so many `workers` trains on them.

    The seed draws which faults, where and when. Witnesses write to `folder`, the run's journal is `journal`.
    """

    def __init__(self, faults: Faults, count: int, workers: int, folder: Path, journal: Path, seed: int) -> None:
        self.struck: list[Struck] = []
        self._faults, self._nodes, self._workers, self._folder, self._seed = faults, count, workers, folder, seed
        self._journal, self._settled = Follower(journal), 0
        self._draw = random.Random(seed)
        self._ill: set[int] = set()  # nodes that are not to be struck again before they are well
        self._mending: list[Future[None]] = []
        self._may_kill_newcomer = False
        at_members: dict[str, Callable[[int], Mending | None]] = {
            "kill a worker": faults.kill,
            "freeze a worker": faults.freeze,
            "stall a worker": faults.stall,
            "crash a node": faults.crash,
            "kill a raylet": faults.kill_raylet,
            "freeze a raylet": faults.freeze_raylet,
            "drain a node": faults.drain,
            "stop Ray on a node": faults.end_raylet,
            "cut a line": faults.cut,
            "thin a line": faults.thin,
            "set a clock ahead": faults.skew_ahead,
            "set a clock back": faults.skew_behind,
        }
        self._blows: dict[str, tuple[Callable[[int], Mending | None], Callable[[], list[int]]]] = {
            **{name: (fault, self._sound) for name, fault in at_members.items()},
            "kill a newcomer": (faults.kill, self._mortal_newcomers),
            "stall a newcomer": (faults.stall, self._newcomers),
            "kill the coordinator": (faults.kill_coordinator, lambda: [HEAD]),
            "fill the disk": (faults.fill_disk, lambda: [DISK]),
        }

    def pass_over(self, training: subprocess.Popen[bytes], samples: int) -> None:
        """Strike until so many samples are settled, then wait for the run's end. Raises `Hang`."""
        with ThreadPoolExecutor(self._nodes + 2) as self._menders:
            while training.poll() is None and self._samples() < samples:
                self._wait(training, self._draw.uniform(0, 2 * PAUSE_S))
                if self._members():
                    for name in self._draw.sample(list(self._blows), self._draw.randint(1, AT_ONCE)):
                        self._strike(name)
            while training.poll() is None:
                self._wait(training, LOOK_S)
        for mending in self._mending:
            mending.result()

    def _strike(self, name: str) -> None:
        fault, places = self._blows[name]
        where = [place for place in places() if place not in self._ill]
        if not where:
            return
        node = self._draw.choice(where)
        self.struck.append(Struck(time.monotonic(), name, node))
        with (self._folder / "struck").open("a") as file:
            print(self.struck[-1], file=file)
        self._may_kill_newcomer = self._may_kill_newcomer and name != "kill a newcomer"
        self._ill.add(node)
        mending = fault(node)
        if mending is None:
            self._ill.discard(node)
        else:
            self._later(mending, node)

    # -- who is where ------------------------------------------------------------------------------------------------

    def _members(self) -> list[int]:
        """Return the nodes with a worker that takes part and that nothing ails."""
        now = time.time()
        seen = {worker_process(file) for file in self._witnessed() if now - file.stat().st_mtime < FRESH_S}
        members = [node for node in self._well() if seen & set(self._faults.workers(node))]
        self._may_kill_newcomer = self._may_kill_newcomer or len(members) == self._workers
        return members

    def _sound(self) -> list[int]:
        """Return the members' nodes, none if too few would be left without one of them."""
        members = self._members()
        return members if len(members) > SPARED else []

    def _newcomers(self) -> list[int]:
        """Return the nodes with a worker that has not rested after any round yet."""
        seen = {worker_process(file) for file in self._witnessed() if file.stat().st_size}
        return [node for node in self._well() if (found := set(self._faults.workers(node))) and not seen & found]

    def _mortal_newcomers(self) -> list[int]:
        """Return those that may be killed: a worker that dies three times before it joins is not started again."""
        return self._newcomers() if self._may_kill_newcomer else []

    def _well(self) -> list[int]:
        return [node for node in range(1, self._nodes + 1) if node not in self._ill]

    def _witnessed(self) -> list[Path]:
        return list(self._folder.glob("*.seen"))

    def _samples(self) -> int:
        """Return how many samples are settled by now."""
        self._settled += sum(record.samples for record in self._journal.fresh() if isinstance(record, Settled))
        return self._settled

    # -- time --------------------------------------------------------------------------------------------------------

    def _wait(self, training: subprocess.Popen[bytes], seconds: float) -> None:
        time.sleep(seconds)
        newest = max((file.stat().st_mtime for file in self._witnessed()), default=time.time())
        if time.time() - newest > STILL_S and training.poll() is None:
            last = "\n".join(f"{struck.at_s:.1f} {struck.fault}, node {struck.node}" for struck in self.struck[-10:])
            raise Hang(f"seed {self._seed}: no round for {STILL_S:g} s after\n{last}")

    def _later(self, mending: Mending, node: int) -> None:
        """Mend when it is time, whatever happens; then the node may be struck again."""

        def wait_and_mend() -> None:
            time.sleep(mending.after_s)
            mending.mend()
            self._ill.discard(node)

        self._mending.append(self._menders.submit(wait_and_mend))
