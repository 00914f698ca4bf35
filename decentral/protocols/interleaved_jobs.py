"""How M-SGC cuts a job into pieces, what a worker is told to do of each job in a round, and what has come of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decentral.members import Members
from decentral.peer import Peer
from decentral.protocols.gradient_codes import Job
from decentral.replica import BatchId


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a job: of each worker `own` sums of `size` gradients, and `groups` of one gradient of each worker.

    Piece p of a worker is its own piece p, or what it sends of group p - `own`.
    """

    workers: int
    own: int
    size: int
    groups: int

    @property
    def span(self) -> int:
        """Local steps of each worker that a job is worth."""
        return self.own * self.size + self.groups

    def begin(self, job: int) -> int:
        """Return the local steps before job `job`, the first of which is 1."""
        return (job - 1) * self.span

    def steps(self, piece: int) -> range:
        """Return the local steps, counted from the job's first, whose batches a piece is made of."""
        if piece < self.own:
            return range(piece * self.size, (piece + 1) * self.size)
        group = piece - self.own
        return range(self.own * self.size + group, self.own * self.size + min(group + 1, self.groups))

    def batches(self, cohort: Members, worker: int, job: int, piece: int, code: Tensor) -> list[tuple[BatchId, float]]:
        """Return the batches whose gradients a worker's piece of a job is the sum of, and their weights."""
        row = zip(cohort, code[cohort.rank(worker)].tolist(), strict=True)
        weights = [(worker, 1.0)] if piece < self.own else [(other, weight) for other, weight in row if weight]
        begin = self.begin(job)
        return [(BatchId(other, begin + step), weight) for step in self.steps(piece) for other, weight in weights]


@dataclass(slots=True, eq=False)
class InterleavedJob:
    """What `came` of a job: own pieces by worker and piece, and coded `groups`.

    The run has `steps` of its local steps; later ones have no batch. Own pieces of who has gone are not waited for.
    """

    peer: Peer
    pieces: Pieces
    steps: int
    groups: list[Job]
    came: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def take(self, worker: int, piece: int, values: Tensor) -> None:
        """Note a worker's piece, `[P]`."""
        if piece < self.pieces.own:
            self.came.setdefault(worker, {})[piece] = values
        elif piece - self.pieces.own < len(self.groups):
            self.groups[piece - self.pieces.own].came[worker] = values

    def lacking(self, worker: int) -> list[int]:
        """Return the own pieces of a worker that have not come."""
        return [piece for piece in range(self.pieces.own) if piece not in self.came.get(worker, ())]

    def due_in(self, slot: int, worker: int) -> int | None:
        """Return the piece that a worker shall do in the job's round `slot`, from 0; None if there is nothing left."""
        lacking = self.lacking(worker)
        if slot < self.pieces.own:
            return slot if slot in lacking else None
        if lacking:
            return lacking[0]
        group = slot - self.pieces.own
        return slot if group < len(self.groups) and worker not in self.groups[group].came else None

    def wanted(self, worker: int, coded: bool) -> int | None:
        """Return the piece of a worker that the sum lacks most: its own, then, if `coded`, of groups that lack some."""
        for piece in self.lacking(worker):
            return piece
        for piece, group in enumerate(self.groups, start=self.pieces.own):
            if coded and worker not in group.came and not group.complete:
                return piece
        return None

    @property
    def complete(self) -> bool:
        """Whether what came gives the sum of all gradients."""
        there = all(not self.lacking(worker) for worker in self.peer.cohort if worker in self.peer.members)
        return there and all(group.complete for group in self.groups)

    def mean(self) -> Tensor | None:
        """Return the mean of all gradients, `[P]`, or None if what came does not give it."""
        if not self.complete:
            return None
        total, count = torch.zeros_like(self.peer.params), 0
        for _, own in sorted(self.came.items()):
            for piece, values in sorted(own.items()):
                total.add_(values)
                count += self._in_run(piece)
        for index, group in enumerate(self.groups):
            mean = group.mean()
            assert mean is not None
            total.add_(mean, alpha=self.pieces.workers)
            count += self.pieces.workers * self._in_run(self.pieces.own + index)
        return total.div_(max(count, 1))

    def _in_run(self, piece: int) -> int:
        return sum(step < self.steps for step in self.pieces.steps(piece))


def packed(number: int, pieces: Sequence[int | None]) -> int:
    """Return round `number` and, for each slot, the piece to do (None: nothing) as one integer."""
    for piece in reversed(pieces):
        number = number * (len(pieces) + 1) + (0 if piece is None else piece + 1)
    return number


def unpacked(assignment: int, slots: int) -> tuple[int, list[int | None]]:
    """Return what `packed` was called with."""
    pieces: list[int | None] = []
    for _ in range(slots):
        assignment, piece = divmod(assignment, slots + 1)
        pieces.append(piece - 1 if piece else None)
    return assignment, pieces
