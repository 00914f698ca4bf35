"""Rounds that are all-reduces, burst by burst: what `butterfly_mean` and a round's vote do with messages.

The rule says what its rounds are (`SyncRule.reductions`). Everybody is told of a round's decision at the same instant,
when nothing is on its way any more. So a round is a function of how long each worker trains and of how many bytes its
frames have, and is worked out once for all rounds in which these are the same: seconds since its beginning. Times may
so differ from those of messages, which add up the whole run's, by the roundings of sums.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from decentral.config import Run
from decentral.fleet import Fleet
from decentral.journal import Left
from decentral.members import cohort_of
from decentral.phantom import Phantom
from decentral.protocols.collectives import Attempt, chunk_bounds, segment_bounds
from decentral.protocols.reductions import Reductions
from decentral.sim.durations import Durations
from decentral.sim.layerwise import FORWARD_SHARE
from decentral.sim.lean.agenda import Agenda
from decentral.sim.lean.bulk import Array, Bulk
from decentral.sim.lean.burst import GATHER, SCATTER, Burst
from decentral.sim.lean.phases import phases_of
from decentral.sim.lean.timed import Timed, Unforeseen
from decentral.sim.lean.timetable import Timetable
from decentral.sim.links import Links
from decentral.sim.memory import check_worker
from decentral.state import Layout
from decentral.traffic import Traffic
from decentral.wire import HeaderSizes, Tag


def time_reductions(
    run: Run, fleet: Fleet, layout: Layout, reductions: Reductions, agenda: Agenda, links: Links
) -> Timed | None:
    """Return what the run comes to, `links` being told the time by `agenda`; None if it takes messages.

    Raises `Unforeseen` if that shows on the way.
    """
    phases = phases_of(reductions.period, run)
    codec = reductions.codec
    plain = not codec.shaped and codec.coder(lambda _name, like: like) is None
    if not (phases and plain and links.steady and reductions.all_reduce == "butterfly"):
        return None
    for worker, group in enumerate(fleet.each()):
        check_worker(run, worker, group.device, layout.size, reductions.slots * layout.size)
    return _Timing(run, fleet, layout, reductions, phases, agenda, links).run()


def _sizes_of(reductions: Reductions, layout: Layout) -> list[int]:
    """Return the elements of the pieces that are reduced, by index."""
    if reductions.pieces is None:
        return [layout.size]
    return [fragment.size for fragment in reductions.pieces.split(layout)]


class _Part(NamedTuple):
    """A segment of a piece."""

    piece: int
    segment: int
    size: int


def _parts_of(sizes: list[int], grain: int) -> list[_Part]:
    """Return the segments of all pieces of these sizes."""
    return [
        _Part(piece, segment, stop - start)
        for piece, size in enumerate(sizes)
        for segment, (start, stop) in enumerate(segment_bounds(size, grain))
    ]


class Frames(NamedTuple):
    """Bytes of worker 0's frames in a round, of each part and chunk `[parts, workers]`; 0 for empty chunks."""

    scatter: Array
    gather: Array

    @property
    def key(self) -> bytes:
        """The same for equal frames."""
        return self.scatter.tobytes() + self.gather.tobytes()


class Spent(NamedTuple):
    """How long a round is in seconds, and `[workers]` how long of it each one talks and waits."""

    ended: float
    talk: Array
    wait: Array


class Carried(NamedTuple):
    """What rounds of certain frames carry: bytes from each worker to each other one, messages and bytes of each."""

    nbytes: Array
    messages: Array
    sent: list[int]


class _Timing:
    """All rounds of a run."""

    def __init__(
        self,
        run: Run,
        fleet: Fleet,
        layout: Layout,
        reductions: Reductions,
        phases: list[int],
        agenda: Agenda,
        links: Links,
    ) -> None:
        self._reductions, self._phases, self._agenda, self._links = reductions, phases, agenda, links
        self._members = cohort_of(fleet.size)
        self._durations = Durations(fleet, run.seed, (), agenda.time)
        self._sizes = _sizes_of(reductions, layout)
        self._parts = _parts_of(self._sizes, reductions.codec.grain)
        segments = [part.segment for part in self._parts]
        self._headers = HeaderSizes()
        self._frames: list[Frames] = []  # by round
        self._spent: dict[bytes, Spent] = {}  # by frames and durations
        self._rounds = _Rounds(fleet, links, run.patience_s, self._widths(), segments)
        self._carried: dict[bytes, Carried] = {}  # by frames
        self._table = Timetable(fleet.size, layout.size, run.batch_size, reductions.channel, self._talk)

    def run(self) -> Timed:
        """Return what the run came to; raises `Unforeseen`."""
        count, rounds = len(self._members), self._rounds
        compute_s, talk_s, wait_s = (np.zeros(count) for _ in range(3))
        nbytes, messages = np.zeros((count, count), np.int64), np.zeros(count, np.int64)
        began_at, step = 0.0, 0
        for round_, steps in enumerate(self._phases, 1):
            self._agenda.now = began_at
            durations = [self._durations(worker, steps) for worker in self._members]
            begins = self._begins(np.array(durations))[[part.piece for part in self._parts]]
            frames = self._frames_of(round_)
            self._frames.append(frames)
            key = frames.key + begins.tobytes()
            if key not in self._spent:
                self._spent[key] = rounds.spent(begins, frames)
            spent = self._spent[key]
            step += steps
            self._tell(round_, steps, step, began_at, durations, began_at + spent.ended)
            compute_s += begins.max(axis=0)
            talk_s += spent.talk
            wait_s += spent.wait
            if frames.key not in self._carried:
                self._carried[frames.key] = rounds.carried(frames)
            carried = self._carried[frames.key]
            nbytes += carried.nbytes
            messages += carried.messages
            began_at += spent.ended
        sent, received = nbytes.sum(axis=1).tolist(), nbytes.sum(axis=0).tolist()
        kinds = zip(compute_s.tolist(), talk_s.tolist(), wait_s.tolist(), strict=True)
        for worker, (compute, talk, wait) in enumerate(kinds):
            self._table.left(
                Left(
                    time_s=began_at,
                    worker=worker,
                    reason="finished",
                    step=step,
                    seconds={"compute": compute, "talk": talk, "wait": wait, "evaluate": 0.0},
                    sent_bytes=sent[worker],
                    received_bytes=received[worker],
                    messages_sent=int(messages[worker]),
                )
            )
        to_sites = rounds.to_sites(nbytes)
        return Timed(self._table, began_at, Traffic(self._links.up_bps, self._links.down_bps, sent, received, to_sites))

    def _tell(
        self, round_: int, steps: int, step: int, began_at: float, durations: list[float], ended_at: float
    ) -> None:
        """Write down a round."""
        for worker, seconds in enumerate(durations):
            if self._reductions.pieces is None:
                self._table.trained(worker, round_, steps, step, began_at + seconds)
                self._table.ended(worker, round_, ended_at)
            else:  # a step is done when the mean of its gradients is there
                self._table.ended(worker, round_, ended_at)
                self._table.trained(worker, round_, steps, step, ended_at)

    def _begins(self, durations: Array) -> Array:
        """Return when each piece is final at each worker `[pieces, workers]`, in seconds since the round began."""
        if self._reductions.pieces is None:
            return durations[None]
        begins = np.empty((len(self._sizes), len(durations)))
        now, size = FORWARD_SHARE * durations, sum(self._sizes)
        for piece in reversed(range(len(self._sizes))):  # the last layer's gradient comes first
            now = begins[piece] = now + (1 - FORWARD_SHARE) * durations * (self._sizes[piece] / size)
        return begins

    def _widths(self) -> Array:
        """Return the bytes that each worker's number takes more in a header than worker 0's."""
        packet = self._reductions.codec.lend(Phantom(1))  # type: ignore[arg-type]
        headers = np.array([self._headers.size(worker, Tag("", 1), packet) for worker in self._members])
        widths: Array = headers - headers[0]
        return widths

    def _frames_of(self, round_: int) -> Frames:
        codec, count = self._reductions.codec, len(self._members)
        frames = np.zeros((2, len(self._parts), count), np.int64)
        for number, part in enumerate(self._parts):
            attempt = Attempt(self._members, self._reductions.channel, round_, str(part.piece))
            chunks = [stop - start for start, stop in chunk_bounds(part.size, count, codec.grain)]
            for kind, letter in ((SCATTER, "s"), (GATHER, "g")):
                tag = attempt.tag(f"{letter}{part.segment or ''}")
                nbytes = {0: 0}
                for chunk in set(chunks) - {0}:
                    packet = codec.lend(Phantom(chunk))  # type: ignore[arg-type]
                    nbytes[chunk] = self._headers.size(0, tag, packet) + packet.nbytes
                frames[kind, number] = [nbytes[chunk] for chunk in chunks]
        return Frames(*frames)

    def _talk(self, worker: int, round_: int) -> tuple[tuple[int, ...], int]:
        """Return who takes part in a round, and the bytes that a worker sends in it."""
        return self._members.ids, self._carried[self._frames[round_ - 1].key].sent[worker]


class _Rounds:
    """What a round costs, whichever it is."""

    def __init__(self, fleet: Fleet, links: Links, patience_s: float, widths: Array, segments: list[int]) -> None:
        workers, options = range(fleet.size), links.options()
        latency_s, pair_bps = options["latency_s"], options.get("pair_bps")
        self._segments, self._sites = segments, fleet.sites()
        self._vote_s, self._patience_s, self._widths = fleet.latency_s, patience_s, widths
        self._latency_s = np.array([[latency_s(one, other) for other in workers] for one in workers])
        self._up_bps, self._down_bps = np.array(links.up_bps), np.array(links.down_bps)
        self._pair_bps = pair_bps and np.array([[pair_bps(one, other) for other in workers] for one in workers])

    def nbytes(self, frames: Frames, kind: int, part: int) -> Array:
        """Return the bytes from each worker to each other one, for one part `[workers, workers]`; 0 for no message."""
        of_worker_0: Array = frames[kind][part]  # by who owns the chunk
        owns = of_worker_0 > 0
        nbytes: Array = (of_worker_0 + self._widths[:, None]) * owns
        if kind == GATHER:
            nbytes = np.repeat(((of_worker_0 + self._widths) * owns)[:, None], len(owns), axis=1)
        np.fill_diagonal(nbytes, 0)
        return nbytes

    def carried(self, frames: Frames) -> Carried:
        """Return what a round carries."""
        count = len(self._widths)
        total, messages = np.zeros((count, count), np.int64), np.zeros(count, np.int64)
        for kind in (SCATTER, GATHER):
            for part in range(len(frames.scatter)):
                nbytes = self.nbytes(frames, kind, part)
                total += nbytes
                messages += (nbytes > 0).sum(axis=1)
        return Carried(total, messages, total.sum(axis=1).tolist())

    def to_sites(self, nbytes: Array) -> dict[int, dict[str | None, int]]:
        """Return what each worker has sent to other sites, of bytes from each worker to each other one."""
        abroad: dict[int, dict[str | None, int]] = {}
        for site in dict.fromkeys(self._sites):
            there = np.array([each == site for each in self._sites])
            for worker, total in enumerate(nbytes[:, there].sum(axis=1).tolist()):
                if total and self._sites[worker] != site:
                    abroad.setdefault(worker, {})[site] = total
        return abroad

    def spent(self, begins: Array, frames: Frames) -> Spent:
        """Return what a round comes to in which each worker has each part at `begins` `[parts, workers]`.

        Raises `Unforeseen` if somebody may wait for longer than the run's patience.
        """
        lines = Bulk(self._up_bps, self._down_bps, self._pair_bps)
        nbytes = functools.partial(self.nbytes, frames)
        burst = Burst(lines, self._latency_s, self._segments, begins, frames.scatter > 0, nbytes)
        burst.run()
        if burst.longest_wait_s() >= self._patience_s:
            raise Unforeseen
        ended = burst.now + self._vote_s + self._vote_s  # to the coordinator and back
        return Spent(ended, burst.talk_s, burst.wait_s + (ended - burst.now))
