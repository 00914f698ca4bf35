"""Who is in a committee, as everybody can work out who knows who is in the run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def hash_order(workers: Iterable[int], round_: int, salt: int) -> list[int]:
    """Return the workers in the order of a keyed hash of (round, worker): a fresh shuffle every round.

    One that leaves changes nobody else's place. The key keeps anybody from choosing an id that often comes first.
    """
    key = salt.to_bytes(8, "little")
    return sorted(workers, key=lambda w: hashlib.blake2b(f"{round_} {w}".encode(), key=key, digest_size=8).digest())


class View:
    """What one worker knows of the others: for each the last round it was active in, and its joins and leaves.

    Events are counted from 0, the first join: who has an even count is in, who has an odd one has left. Two views merge
    into the larger of either number, so the order in which news comes, and how often, does not matter.
    """

    def __init__(self, workers: Sequence[int]) -> None:
        self._place = {worker: place for place, worker in enumerate(workers)}
        self.table = torch.zeros(len(workers), 2)
        """[workers, 2]: last active round and events; float32 is exact up to 16 million."""

    def merge(self, table: Tensor) -> None:
        """Learn what another view knows: `[workers, 2]`, or flat."""
        self.table = torch.maximum(self.table, table.view_as(self.table))

    def saw(self, worker: int, round_: int) -> None:
        """The worker was active in a round."""
        row = self.table[self._place[worker]]
        row[0] = max(float(row[0]), round_)

    def left(self, worker: int) -> None:
        """The worker has left; nothing if that is known."""
        row = self.table[self._place[worker]]
        row[1] += 1 - row[1] % 2

    def joined(self, worker: int) -> None:
        """The worker is in; nothing if that is known."""
        row = self.table[self._place[worker]]
        row[1] += row[1] % 2

    def order(self, round_: int, salt: int, inactivity: int) -> list[int]:
        """Return who is in, and has been active in the last `inactivity` rounds, in the round's order."""
        rows = self.table.tolist()
        present = [
            worker
            for worker, place in self._place.items()
            if rows[place][1] % 2 == 0 and round_ - rows[place][0] <= inactivity
        ]
        return hash_order(present, round_, salt)
