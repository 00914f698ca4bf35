"""How long a pipeline stands when one of its stages is killed in the midst of a batch, on a real Ray on this machine.

Run from the repository's root (about a minute, and ten seconds for each kill):

    python -m benchmarks.lost_stage [--kills 4] [--recovery checkfree_plus]

A byte GPT is cut into four stages, a worker each. In every 150th local step a stage kills itself with SIGKILL while
microbatches are on their way: the second, the first, the third and the last in turn (with "checkfree", which cannot
rebuild the ends, the second and the third). Its worker gets another life, the stage is rebuilt, and the row does the
step anew. Measured is the time from the kill until all four stages have done that step, and over how many steps the
mean loss of ten is above what it was before.
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
VICTIMS = {"checkfree_plus": (3, 1, 0, 2), "redundant": (3, 1, 0, 2), "checkfree": (2, 1)}
"""Who is killed at the k-th turn: the one at place k modulo their number."""
EVERY = 150
"""Local steps between two kills."""
AMID_S = 0.01
"""Seconds into a step after which a stage kills itself."""
WINDOW = 10
"""Steps whose mean loss is compared."""


class Struck(LocalSGD):
    """Local SGD, a round after each step, whose stages kill themselves in turn; they note when."""

    folder: Path
    victims: tuple[int, ...]

    async def run(self, peer: Peer) -> None:
        peer.keepers.append(_Fate(peer, self.folder, self.victims))
        await super().run(peer)


class _Fate:
    """Notes when its worker is at rest, and whether it is time to die."""

    def __init__(self, peer: Peer, folder: Path, victims: Sequence[int]) -> None:
        self._peer, self._folder, self._victims = peer, folder, victims
        self._first = peer.step
        self._notes = os.open(folder / f"rests-{peer.id}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def rest(self) -> None:
        os.write(self._notes, f"{self._peer.step} {time.monotonic()}\n".encode())
        turn, since = divmod(self._peer.step, EVERY)
        is_time = since == 0 and turn and self._peer.step > self._first
        if is_time and self._peer.id == self._victims[turn % len(self._victims)]:
            asyncio.get_running_loop().call_later(AMID_S, _die, self._folder / f"death-{turn:03d}")


def _die(note: Path) -> None:
    note.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def recoveries(folder: Path) -> list[float]:
    """Return for each death the seconds until all stages had done the step that was under way, in order of deaths."""
    rests = [[line.split() for line in file.read_text().splitlines()] for file in folder.glob("rests-*")]
    found = []
    for turn, file in enumerate(sorted(folder.glob("death-*")), 1):
        death = float(file.read_text())
        done = [
            min(float(at) for step, at in notes if int(step) > EVERY * turn and float(at) > death) for notes in rests
        ]
        found.append(max(done) - death)
    return found


def steps_above(losses: Sequence[float], step: int) -> int:
    """Return after how many steps the mean loss of a window is down again to what it was before local step `step`."""
    before = statistics.fmean(losses[step - WINDOW : step])
    ends = range(step + WINDOW, len(losses) + 1)
    return next(
        (end - step for end in ends if statistics.fmean(losses[end - WINDOW : end]) <= before), len(losses) - step
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--recovery", choices=tuple(VICTIMS), default="checkfree_plus")
    arguments = parser.parse_args()
    kills, recovery = arguments.kills, arguments.recovery
    victims = VICTIMS[recovery]
    with tempfile.TemporaryDirectory() as folder:
        run = validated(
            {
                "steps": EVERY * (kills + 1),
                "batch_size": 8,
                "evaluate_every": 0,
                "task": {"name": "byte_gpt", "width": 64, "depth": 8, "context": 64},
                "inner": {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0},
                "rule": {"name": "benchmarks.lost_stage:Struck", "period": 1, "folder": folder, "victims": victims},
                "pipeline": {"stages": STAGES, "microbatches": 4, "recovery": recovery},
                "fleet": {"workers": [{"count": STAGES}]},
            },
            "lost_stage",
        )
        outcome = train(run)
        seconds = recoveries(Path(folder))
    losses = [record.loss for record in outcome.records if isinstance(record, Trained) and record.loss is not None]
    rebuilt = sum(isinstance(record, Rebuilt) for record in outcome.records)
    above = [steps_above(losses, EVERY * turn) for turn in range(1, kills + 1)]
    killed = [victims[turn % len(victims)] for turn in range(1, len(seconds) + 1)]
    print("seconds by stage:", " ".join(f"{stage}: {each:.2f}" for stage, each in zip(killed, seconds, strict=True)))
    print("steps until the loss is back:", *above, f"(median {statistics.median(above):g})")
    print(f"{len(seconds)} kills, {rebuilt} stages rebuilt")
    print(f"the step is done after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s at most")


if __name__ == "__main__":
    main()
