"""Rules that leave a line in a file whenever a worker rests after a round: when, which round, and what it then was.

Lines of a worker that is killed survive it, unlike records that it had not handed in yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from decentral.peer import Peer
from decentral.protocols import DDP, DiLoCo, Gossip, LocalSGD, NoLoCo, SyncRule

CHANNEL = "sync"


@dataclass(frozen=True, slots=True)
class Sight:
    """At `at_s` of this machine's monotonic clock a life of `worker` rested after `round`, its parameters `digest`.

    `is_last`: that life has not been seen again.
    """

    at_s: float
    worker: int
    round: int
    digest: int
    is_last: bool


class Witness:
    """Keeps an eye on one worker."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self._peer, self._seen = peer, 0
        self._file = os.open(folder / f"{peer.id}-{os.getpid()}.seen", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def rest(self) -> None:
        """Write a line if a round has ended since the last one."""
        number = max(self._peer.rounds_settled.values(), default=0)
        if number > self._seen:
            self._seen = number
            digest = self._peer.replica.digest()
            os.write(self._file, f"{time.monotonic()} {self._peer.id} {number} {digest}\n".encode())


class Witnessed(SyncRule):
    """Mixed into a rule: has each worker watched by a `Witness`."""

    folder: Path

    async def run(self, peer: Peer) -> None:
        peer.keepers.append(Witness(peer, self.folder))
        await super().run(peer)  # type: ignore[safe-super]


class WitnessedDDP(Witnessed, DDP):
    """DDP, watched."""


class WitnessedDiLoCo(Witnessed, DiLoCo):
    """DiLoCo, watched."""


class WitnessedGossip(Witnessed, Gossip):
    """Gossip, watched."""


class WitnessedLocalSGD(Witnessed, LocalSGD):
    """Local SGD, watched."""


class WitnessedNoLoCo(Witnessed, NoLoCo):
    """NoLoCo, watched."""


def worker_process(file: Path) -> int:
    """Return the process whose worker writes to this file."""
    return int(file.stem.partition("-")[2])


def sights(folder: Path) -> Iterator[Sight]:
    """Yield what witnesses have written so far."""
    for file in sorted(folder.glob("*.seen")):
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for place, line in enumerate(lines, 1):
            at_s, worker, number, digest = line.split()
            yield Sight(float(at_s), int(worker), int(number), int(digest), is_last=place == len(lines))
