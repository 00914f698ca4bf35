"""How long a pipeline stands when one of its stages is killed in the midst of a batch, on a real Ray on this machine.

Run from the repository's root (about two minutes):

    python -m benchmarks.lost_stage

A byte GPT is cut into four stages, a worker each. In every 150th local step a middle stage kills itself with SIGKILL
while microbatches are on their way; its worker gets another life, the stage is rebuilt from its neighbours, and the row
does the step anew. Measured is the time from the kill until the first stage has done that step, and over how many steps
the mean loss of ten is above what it was before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from decentral.config import validated
from decentral.journal import Rebuilt, Trained
from decentral.peer import Peer
from decentral.protocols import LocalSGD
from decentral.workers.launch import train

STAGES = 4
MIDDLE = (1, 2)
EVERY = 150
"""Local steps between two kills."""
AMID_S = 0.01
"""Seconds into a step after which a stage kills itself."""
WINDOW = 10
"""Steps whose mean loss is compared."""


class Struck(LocalSGD):
    """Local SGD, a round after each step, whose middle stages kill themselves in turn; they note when."""

    folder: Path

    async def run(self, peer: Peer) -> None:
        peer.keepers.append(_Fate(peer, self.folder))
        await super().run(peer)


class _Fate:
    """Says at rest whether it is time to die, and notes when the first stage is at rest."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self._peer, self._folder = peer, folder
        self._first = peer.step
        if peer.id == 0:
            self._notes = os.open(folder / "rests", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def rest(self) -> None:
        turn, since = divmod(self._peer.step, EVERY)
        if self._peer.id == 0:
            os.write(self._notes, f"{time.monotonic()}\n".encode())
        elif since == 0 and turn and self._peer.step > self._first and self._peer.id == MIDDLE[turn % len(MIDDLE)]:
            asyncio.get_running_loop().call_later(AMID_S, _die, self._folder / f"death-{turn}")


def _die(note: Path) -> None:
    note.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def recoveries(folder: Path) -> list[float]:
    """Return for each death the seconds until the first stage was at rest again, in order of deaths."""
    rests = [float(line) for line in (folder / "rests").read_text().split()]
    deaths = sorted(float(file.read_text()) for file in folder.glob("death-*"))
    return [min(at for at in rests if at > death) - death for death in deaths]


def steps_above(losses: Sequence[float], step: int) -> int:
    """Return after how many steps the mean loss of a window is down again to what it was before local step `step`."""
    before = statistics.fmean(losses[step - WINDOW : step])
    ends = range(step + WINDOW, len(losses) + 1)
    return next(
        (end - step for end in ends if statistics.fmean(losses[end - WINDOW : end]) <= before), len(losses) - step
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=3)
    kills: int = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        run = validated(
            {
                "steps": EVERY * (kills + 1),
                "batch_size": 8,
                "evaluate_every": 0,
                "task": {"name": "byte_gpt", "width": 64, "depth": 8, "context": 64},
                "inner": {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0},
                "rule": {"name": "benchmarks.lost_stage:Struck", "period": 1, "folder": folder},
                "pipeline": {"stages": STAGES, "microbatches": 4},
                "fleet": {"workers": [{"count": STAGES}]},
            },
            "lost_stage",
        )
        outcome = train(run)
        seconds = recoveries(Path(folder))
    losses = [record.loss for record in outcome.records if isinstance(record, Trained) and record.loss is not None]
    rebuilt = sum(isinstance(record, Rebuilt) for record in outcome.records)
    above = [steps_above(losses, EVERY * turn) for turn in range(1, kills + 1)]
    print("seconds:", " ".join(f"{each:.2f}" for each in seconds))
    print("steps until the loss is back:", *above, f"(median {statistics.median(above):g})")
    print(f"{len(seconds)} kills, {rebuilt} stages rebuilt")
    print(f"the step is done after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s at most")


if __name__ == "__main__":
    main()
