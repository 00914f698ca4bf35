"""How long survivors stand when a worker is killed in mid-round, on a real Ray on this machine.

Run from the repository's root (about two minutes):

    python -m benchmarks.recovery

Four workers train with DiLoCo. In every 25th round, if all take part, one of them kills itself with SIGKILL while
its contribution is on the way; the others reduce again without it, and it comes back as a newcomer. Measured is the
time from the kill until the last of the survivors begins its next local step.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from decentral.config import validated
from decentral.peer import Peer
from decentral.protocols import DiLoCo
from decentral.protocols.rounds import Round
from decentral.tasks import Quadratic
from decentral.workers.launch import train

WORKERS = 4
PARAMETERS = 250_000
STEP_S = 0.02
PERIOD = 10
EVERY = 25
"""Rounds between two kills."""
SENDING_S = 0.005
"""Seconds after which a worker kills itself that has begun to send."""


class Paced(Quadratic):
    """A quadratic each of whose steps takes a stated time."""

    name: ClassVar[str] = ""

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        time.sleep(STEP_S)
        return super().batch(worker, start, size)


class Struck(DiLoCo):
    """DiLoCo whose workers kill themselves in turn; they note when, and when they train."""

    folder: Path

    async def run(self, peer: Peer) -> None:
        peer.keepers.append(_Notes(self.folder / f"rests-{peer.id}-{os.getpid()}"))
        await super().run(peer)

    def begin(self, peer: Peer, *arguments: Any, **options: Any) -> Round:
        round_ = super().begin(peer, *arguments, **options)
        turn = round_.number // EVERY
        if round_.number % EVERY == 0 and len(peer.members) == WORKERS and peer.id == turn % WORKERS:
            asyncio.get_running_loop().call_later(SENDING_S, _die, self.folder / f"death-{turn}")
        return round_


class _Notes:
    """Notes in a file when a worker is at rest, about to train."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def rest(self) -> None:
        os.write(self._file, f"{time.monotonic()}\n".encode())


def _die(note: Path) -> None:
    note.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def recoveries(folder: Path) -> list[float]:
    """Return for each death the seconds until the last of the survivors trained again, in order of deaths."""
    rests = {file: [float(line) for line in file.read_text().split()] for file in folder.glob("rests-*")}
    deaths = sorted(float(file.read_text()) for file in folder.glob("death-*"))
    seconds = []
    for death in deaths:
        survivors = [times for times in rests.values() if times and times[0] < death < times[-1]]
        seconds.append(max(min(at for at in times if at > death) - death for times in survivors))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    kills: int = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        run = validated(
            {
                "steps": PERIOD * (EVERY * (kills + 1) - 1),
                "batch_size": 1,
                "evaluate_every": 0,
                "task": {"name": "benchmarks.recovery:Paced", "dimension": PARAMETERS},
                "inner": {"name": "sgd", "lr": 0.001},
                "rule": {"name": "benchmarks.recovery:Struck", "period": PERIOD, "folder": folder},
                "fleet": {"workers": [{"count": WORKERS}]},
            },
            "recovery",
        )
        began = time.monotonic()
        train(run)
        seconds = recoveries(Path(folder))
    print(" ".join(f"{each:.2f}" for each in seconds))
    print(
        f"{len(seconds)} of {kills} kills in mid-round; survivors train again after {statistics.median(seconds):.2f} s "
        f"(median), {max(seconds):.2f} s at most; {time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
