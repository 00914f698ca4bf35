"""Rounds that are exchanges, event by event: what `conclude` does with messages, in a third of the function calls.

The rule says what its rounds are (`SyncRule.exchanges`); schedule, topology, codec, headers, lines, latencies,
durations and meters are those of the message simulation, and tests hold both to the same records. Nothing here knows of
a worker that goes, of a capacity that changes or of one who loses patience: such runs take messages.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from decentral.config import Run
from decentral.fleet import Fleet
from decentral.inner import Inner
from decentral.journal import Left
from decentral.members import Members, cohort_of
from decentral.meter import Meter
from decentral.peer import Peer
from decentral.phantom import Phantom
from decentral.protocols.exchanges import Exchanges
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import SCHEDULES
from decentral.protocols.topology import TOPOLOGIES, Links
from decentral.sim.durations import Durations
from decentral.sim.lean.agenda import Agenda
from decentral.sim.lean.lines import Flow, Lines
from decentral.sim.lean.timetable import Timetable
from decentral.sim.links import Links as FleetLinks
from decentral.sim.memory import check_worker
from decentral.sim.watch import SiteTally
from decentral.traffic import Traffic
from decentral.wire import HeaderSizes, Tag, signal

FIRST = Tag("", 1)
"""Any tag: headers differ by the worker's number alone."""


class Timed(NamedTuple):
    """What a run came to: its records, its length in virtual seconds, and what its network carried."""

    records: Timetable
    seconds: float
    traffic: Traffic


def timed(run: Run, fleet: Fleet, parameters: int) -> Timed | None:
    """Return what a run without tensors comes to on a fleet whose step times are known; None if it takes messages."""
    exchanges = _exchanges_of(run.rule)
    if exchanges is None or run.leases or fleet.events or fleet.brings_newcomers:
        return None
    for worker, group in enumerate(fleet.each()):
        check_worker(run, worker, group.device, parameters, exchanges.slots * parameters)
    agenda = Agenda()
    links = FleetLinks(fleet, run.seed, agenda.time)
    if not links.options().keys() <= {"up_bps", "down_bps", "latency_s", "pair_bps"}:
        return None  # capacities change, or flows have terms of their own
    timing = _Timing(run, fleet, parameters, exchanges, agenda, links)
    try:
        return timing.run()
    except _Impatient:
        return None


def _exchanges_of(rule: SyncRule) -> Exchanges | None:
    """Return what the rule's rounds are, if it says so beside its `run`, and of parts that are known to fit in here."""
    cls = next(cls for cls in type(rule).__mro__ if "run" in vars(cls))
    exchanges = rule.exchanges() if "exchanges" in vars(cls) else None
    if exchanges is None or not exchanges.period.equal:
        return None
    known = type(exchanges.period) in SCHEDULES.values() and type(exchanges.topology) in TOPOLOGIES.values()
    return exchanges if known else None


class _Impatient(Exception):
    """Somebody has waited for longer than the run's patience."""


class _Worker:
    """One worker: what schedules and topologies ask of a peer, and how far it has come."""

    __slots__ = (
        "agreed",
        "budget",
        "cohort",
        "expects",
        "heard",
        "id",
        "inner",
        "links",
        "members",
        "meter",
        "needs",
        "round",
        "seed",
        "step",
        "steps",
        "unsent",
        "waits_since",
    )

    def __init__(self, worker: int, run: Run, members: Members, meter: Meter) -> None:
        self.id, self.seed, self.budget = worker, run.seed, run.steps
        self.inner: Inner = run.inner
        self.members = self.cohort = members
        self.meter = meter
        self.step = self.steps = self.round = self.unsent = 0
        self.links = Links((), ())
        self.heard: dict[int, int] = {}  # by round, how many contributions have come
        self.agreed: dict[int, int] = {}  # and how many verdicts
        self.expects: dict[int, int] | None = None  # the one of both for which it waits
        self.needs = 0
        self.waits_since = 0.0

    @property
    def steps_left(self) -> int:
        return self.budget - self.step


class _Timing:
    """All workers of a run, and what happens to them."""

    def __init__(
        self, run: Run, fleet: Fleet, parameters: int, exchanges: Exchanges, agenda: Agenda, links: FleetLinks
    ) -> None:
        options = links.options()
        self._agenda, self._exchanges, self._fleet_links = agenda, exchanges, links
        self._patience_s = run.patience_s
        self._durations = Durations(fleet, run.seed, (), agenda.time)
        pair_bps = options.get("pair_bps")
        self._lines = Lines(agenda, links.up_bps, links.down_bps, options["latency_s"], pair_bps, self._arrived)
        members = cohort_of(fleet.size)
        self._workers = [_Worker(worker, run, members, Meter(agenda.time)) for worker in members]
        self._packet = exchanges.codec.encode(Phantom(parameters))  # type: ignore[arg-type]
        self._headers = HeaderSizes()
        self._frames: list[tuple[int, int]] = []  # bytes of worker 0's contribution and verdict, by round
        sizes = [self._headers.size(worker, FIRST, self._packet) for worker in members]
        self._widths = [size - sizes[0] for size in sizes]  # bytes that a worker's number takes more than worker 0's
        self._sites = SiteTally(fleet.sites())
        self._table = Timetable(fleet.size, parameters, run.batch_size, exchanges.channel, self._talk)
        self._up_bytes, self._down_bytes = [0] * fleet.size, [0] * fleet.size

    def run(self) -> Timed:
        """Return what the run came to; raises `_Impatient`."""
        for worker in self._workers:
            self._begin(worker)
        self._agenda.run()
        links = self._fleet_links
        traffic = Traffic(links.up_bps, links.down_bps, self._up_bytes, self._down_bytes, self._sites.nbytes)
        return Timed(self._table, self._table.seconds, traffic)

    # A round.

    def _begin(self, worker: _Worker) -> None:
        worker.steps = min(self._exchanges.period.steps(cast(Peer, worker)), worker.steps_left)
        if worker.steps:
            worker.round += 1
            worker.meter.begin_work("compute")
            ends_at = self._agenda.now + self._durations(worker.id, worker.steps)
            self._agenda.add(ends_at, self._trained, worker)
        elif not worker.unsent:
            self._leave(worker)

    def _trained(self, worker: _Worker) -> None:
        worker.meter.end_work()
        worker.step += worker.steps
        self._table.trained(worker.id, worker.round, worker.steps, worker.step, self._agenda.now)
        if worker.round > len(self._frames):
            self._frames.append(self._frames_of(worker.round))
        worker.links = links = self._exchanges.topology.links(cast(Peer, worker), worker.round)
        for to in links.to:
            self._send(worker, to, verdict=False)
        self._wait(worker, worker.heard, len(links.source))

    def _heard(self, worker: _Worker) -> None:
        """Everybody's contribution is here."""
        for source in worker.links.source:
            self._send(worker, source, verdict=True)
        self._wait(worker, worker.agreed, len(worker.links.to))

    def _agreed(self, worker: _Worker) -> None:
        """Everybody's verdict is here."""
        self._table.ended(worker.id, worker.round, self._agenda.now)
        self._begin(worker)

    # Waiting and talking.

    def _wait(self, worker: _Worker, mail: dict[int, int], needs: int) -> None:
        worker.expects, worker.needs, worker.waits_since = mail, needs, self._agenda.now
        self._look(worker)

    def _look(self, worker: _Worker) -> None:
        """Go on if all that the worker waits for has come."""
        mail = worker.expects
        if mail is None or mail.get(worker.round, 0) < worker.needs:
            return
        if self._agenda.now - worker.waits_since >= self._patience_s:
            raise _Impatient
        mail.pop(worker.round, None)
        worker.expects = None
        if mail is worker.heard:
            self._heard(worker)
        else:
            self._agreed(worker)

    def _send(self, worker: _Worker, to: int, verdict: bool) -> None:
        nbytes = self._frames[worker.round - 1][verdict] + self._widths[worker.id]
        worker.meter.sent(nbytes)
        if self._sites.several:
            self._sites.sent(worker.id, to, nbytes)
        self._up_bytes[worker.id] += nbytes
        worker.meter.begin_transfer()
        self._workers[to].meter.begin_transfer()
        worker.unsent += 1
        self._lines.send(Flow(worker.id, to, nbytes, worker.round, verdict))

    def _arrived(self, flow: Flow) -> None:
        source, target = self._workers[flow.source], self._workers[flow.to]
        target.meter.received_bytes += flow.nbytes
        self._down_bytes[flow.to] += flow.nbytes
        source.meter.end_transfer()
        target.meter.end_transfer()
        source.unsent -= 1
        mail = target.agreed if flow.verdict else target.heard
        mail[flow.round] = mail.get(flow.round, 0) + 1
        if mail is target.expects:
            self._look(target)
        if not (source.unsent or source.steps):
            self._leave(source)

    def _leave(self, worker: _Worker) -> None:
        meter = worker.meter
        meter.close()
        self._table.left(
            Left(
                time_s=self._agenda.now,
                worker=worker.id,
                reason="finished",
                step=worker.step,
                seconds=dict(meter.seconds),
                sent_bytes=meter.sent_bytes,
                received_bytes=meter.received_bytes,
                messages_sent=meter.messages_sent,
            )
        )

    def _frames_of(self, round_: int) -> tuple[int, int]:
        """Return the bytes of worker 0's contribution and of its verdict, with their headers."""
        contribution, verdict = (
            self._headers.size(0, Tag(self._exchanges.channel, round_, part), packet) + packet.nbytes
            for part, packet in ((self._exchanges.part, self._packet), ("v", signal("ok")))
        )
        return contribution, verdict

    def _talk(self, worker: int, round_: int) -> tuple[tuple[int, ...], int]:
        """Return who takes part in a worker's exchange, and the bytes that it sends in it."""
        links = self._exchanges.topology.links(cast(Peer, self._workers[worker]), round_)
        contribution, verdict = self._frames[round_ - 1]
        nbytes = len(links.to) * contribution + len(links.source) * verdict
        nbytes += (len(links.to) + len(links.source)) * self._widths[worker]
        return tuple(sorted({worker, *links.to, *links.source})), nbytes
