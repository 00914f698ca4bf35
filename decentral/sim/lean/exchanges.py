"""Rounds that are exchanges, event by event: what `conclude` does with messages, in a fraction of the function calls.

The rule says what its rounds are (`SyncRule.exchanges`); schedule, topology, codec, headers, lines, latencies,
durations and meters are those of the message simulation, and tests hold both to the same records. Nothing here knows of
a worker that goes, of a capacity that changes or of one who loses patience: such runs take messages.

Where workers meet in pairs most exchanges are no event at all. Whoever has trained first sends its contribution
*quietly*: nothing is done until somebody else touches one of the two, which makes it an ordinary flow from its
beginning. If nobody has when the other one has trained, and nobody can before all is over (those who are about to send
have said when; whoever begins to train later sends a shortest phase later), all times follow from `pairs.meet`.
"""

from __future__ import annotations

import math
from typing import cast

from decentral.config import Run
from decentral.fleet import Fleet
from decentral.journal import Left
from decentral.members import Members, cohort_of
from decentral.meter import Meter
from decentral.peer import Peer
from decentral.phantom import Phantom
from decentral.protocols.exchanges import Exchanges
from decentral.protocols.topology import TOPOLOGIES, Links
from decentral.sim.durations import Durations
from decentral.sim.lean.agenda import Agenda
from decentral.sim.lean.lines import Flow, Lines
from decentral.sim.lean.pairs import Meeting, Way, meet
from decentral.sim.lean.phases import phases_of
from decentral.sim.lean.timed import Timed, Unforeseen
from decentral.sim.lean.timetable import Timetable
from decentral.sim.links import Links as FleetLinks
from decentral.sim.memory import check_worker
from decentral.sim.watch import SiteTally
from decentral.traffic import Traffic
from decentral.wire import HeaderSizes, Tag, signal

FIRST = Tag("", 1)
"""Any tag: headers differ by the worker's number alone."""


def time_exchanges(
    run: Run, fleet: Fleet, parameters: int, exchanges: Exchanges, agenda: Agenda, links: FleetLinks
) -> Timed | None:
    """Return what the run comes to, `links` being told the time by `agenda`; None if it takes messages.

    Raises `Unforeseen` if that shows on the way.
    """
    phases = phases_of(exchanges.period, run)
    if not phases or type(exchanges.topology) not in TOPOLOGIES.values():
        return None
    for worker, group in enumerate(fleet.each()):
        check_worker(run, worker, group.device, parameters, exchanges.slots * parameters)
    return _Timing(run, fleet, parameters, exchanges, phases, agenda, links).run()


class _Worker:
    """One worker: what topologies ask of a peer, and how far it has come."""

    __slots__ = (
        "agreed",
        "cohort",
        "due",
        "expects",
        "heard",
        "id",
        "links",
        "members",
        "meter",
        "needs",
        "quiet",
        "round",
        "seed",
        "step",
        "steps",
        "trained_at",
        "unsent",
        "waits_since",
    )

    def __init__(self, worker: int, run: Run, members: Members, meter: Meter) -> None:
        self.id, self.seed = worker, run.seed
        self.members = self.cohort = members
        self.meter = meter
        self.step = self.steps = self.round = self.unsent = 0
        self.links = Links((), ())
        self.heard: dict[int, int] = {}  # by round, how many contributions have come
        self.agreed: dict[int, int] = {}  # and how many verdicts
        self.expects: dict[int, int] | None = None  # the one of both for which it waits
        self.needs = 0
        self.waits_since = 0.0
        # Where workers meet in pairs:
        self.due: list[float] = []  # when others will begin to send it their contributions
        self.quiet: _Worker | None = None  # the one whose quiet contribution goes from or to it
        self.trained_at = 0.0


class _Timing:
    """All workers of a run, and what happens to them."""

    def __init__(
        self,
        run: Run,
        fleet: Fleet,
        parameters: int,
        exchanges: Exchanges,
        phases: list[int],
        agenda: Agenda,
        links: FleetLinks,
    ) -> None:
        options = links.options()
        self._agenda, self._exchanges, self._phases, self._fleet_links = agenda, exchanges, phases, links
        self._patience_s = run.patience_s
        self._durations = Durations(fleet, run.seed, (), agenda.time)
        self._shortest_step_s = self._durations.shortest_step_s()
        self._latency_s = options["latency_s"]
        pair_bps = options.get("pair_bps")
        self._lines = Lines(agenda, links.up_bps, links.down_bps, self._latency_s, pair_bps, self._arrived)
        self._pairs = exchanges.topology.pairs and links.steady
        members = cohort_of(fleet.size)
        self._workers = [_Worker(worker, run, members, Meter(agenda.time)) for worker in members]
        self._packet = exchanges.codec.encode(Phantom(parameters))  # type: ignore[arg-type]
        self._headers = HeaderSizes()
        self._furthest = 0  # the round that somebody has begun
        # Bytes of worker 0's contribution and verdict, by round.
        self._frames = [self._frames_of(round_) for round_ in range(1, 1 + len(phases))]
        sizes = [self._headers.size(worker, FIRST, self._packet) for worker in members]
        self._widths = [size - sizes[0] for size in sizes]  # bytes that a worker's number takes more than worker 0's
        self._sites = SiteTally(fleet.sites())
        self._table = Timetable(fleet.size, parameters, run.batch_size, exchanges.channel, self._talk)
        self._up_bytes, self._down_bytes = [0] * fleet.size, [0] * fleet.size

    def run(self) -> Timed:
        """Return what the run came to; raises `Unforeseen`."""
        for worker in self._workers:
            self._begin(worker)
        self._agenda.run()
        links = self._fleet_links
        traffic = Traffic(links.up_bps, links.down_bps, self._up_bytes, self._down_bytes, self._sites.nbytes)
        return Timed(self._table, self._table.seconds, traffic)

    # A round.

    def _begin(self, worker: _Worker) -> None:
        if worker.round == len(self._phases):
            worker.steps = 0
            if not worker.unsent:
                self._leave(worker)
            return
        worker.steps = steps = self._phases[worker.round]
        worker.round = round_ = worker.round + 1
        self._furthest = max(self._furthest, round_)
        worker.links = self._exchanges.topology.links(cast(Peer, worker), round_)
        worker.meter.begin_work("compute")
        seconds = self._durations(worker.id, steps)
        if seconds < steps * self._shortest_step_s:
            raise Unforeseen
        ends_at = self._agenda.now + seconds
        if self._pairs and worker.links.to:
            self._workers[worker.links.to[0]].due.append(ends_at)
        self._agenda.add(ends_at, self._trained, worker)

    def _trained(self, worker: _Worker) -> None:
        now = self._agenda.now
        partner = self._workers[worker.links.to[0]] if self._pairs and worker.links.to else None
        meeting, quiet = None, False
        if partner is not None:
            partner.due.remove(now)
            if worker.quiet is partner and partner.round == worker.round:
                meeting = self._meeting(partner, worker)
            quiet = meeting is None and self._can_be_quiet(worker, partner)
        if worker.quiet is not None and meeting is None:
            self._speak_up(worker.quiet)  # while we still compute, as we did when that contribution began
        worker.meter.end_work()
        worker.step += worker.steps
        worker.trained_at = now
        self._table.trained(worker.id, worker.round, worker.steps, worker.step, now)
        if partner is not None and meeting is not None:
            self._conclude(partner, worker, meeting)
        elif partner is not None and quiet:
            worker.quiet = partner.quiet = worker
        else:
            self._contribute(worker)

    def _contribute(self, worker: _Worker) -> None:
        """Send the contribution to everybody, and wait for theirs."""
        links = worker.links
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

    # Pairs.

    def _can_be_quiet(self, worker: _Worker, partner: _Worker) -> bool:
        """Say whether nobody touches the two at present, and the partner has not spoken."""
        return (
            worker.quiet is None
            and partner.quiet is None
            and partner.expects is None
            and not (worker.meter.transfers or partner.meter.transfers)
        )

    def _meeting(self, first: _Worker, second: _Worker) -> Meeting | None:
        """Return when all happens in an exchange that is begun now by its second worker; None if others may matter."""
        now = self._agenda.now
        meeting = meet(self._way(first, second, first.trained_at), self._way(second, first, now))
        # Whoever sends to one of them before all is over is training already, or will train for one phase at least.
        phases = self._phases[second.round : self._furthest + 1]
        if meeting.over > now + min(phases, default=math.inf) * self._shortest_step_s:
            return None
        due = first.due + second.due
        return None if due and min(due) < meeting.over else meeting

    def _way(self, worker: _Worker, to: _Worker, begins_at: float) -> Way:
        contribution, verdict = self._frames[worker.round - 1]
        width = self._widths[worker.id]
        return Way(
            begins_at,
            8.0 * (contribution + width),
            8.0 * (verdict + width),
            self._lines.capacity(worker.id, to.id),
            self._latency_s(worker.id, to.id),
        )

    def _speak_up(self, worker: _Worker) -> None:
        """Somebody touches a worker whose contribution was quiet, or who it goes to: it is a flow like all others."""
        worker.quiet = self._workers[worker.links.to[0]].quiet = None
        self._agenda.do_at(worker.trained_at, self._contribute, worker)

    def _conclude(self, first: _Worker, second: _Worker, meeting: Meeting) -> None:
        """Book an exchange, and have both go on when it has ended for them."""
        now, came = self._agenda.now, meeting.one_came
        first.quiet = second.quiet = None
        if came < now:
            first.meter.book("talk", came)
            first.meter.book("wait", now)
        for worker, other in ((first, second), (second, first)):
            nbytes = sum(self._frames[worker.round - 1]) + 2 * self._widths[worker.id]
            self._count_sent(worker, other, nbytes, messages=2)
            self._count_received(other, nbytes)
        for worker, began_at, heard_at, ended_at, told_at in (
            (first, first.trained_at, meeting.one_heard, meeting.one_ended, meeting.one_told),
            (second, now, meeting.other_heard, meeting.other_ended, meeting.other_told),
        ):
            if max(heard_at - began_at, ended_at - heard_at) >= self._patience_s:
                raise Unforeseen
            self._table.ended(worker.id, worker.round, ended_at)
            if worker.round == len(self._phases):
                ended_at = max(ended_at, told_at)  # it stays until its verdict has arrived
            worker.meter.book("talk", ended_at)
            self._agenda.do_at(ended_at, self._begin, worker)

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
            raise Unforeseen
        mail.pop(worker.round, None)
        worker.expects = None
        if mail is worker.heard:
            self._heard(worker)
        else:
            self._agreed(worker)

    def _send(self, worker: _Worker, to: int, verdict: bool) -> None:
        target = self._workers[to]
        for each in (worker, target):
            if each.quiet is not None:
                self._speak_up(each.quiet)
        nbytes = self._frames[worker.round - 1][verdict] + self._widths[worker.id]
        self._count_sent(worker, target, nbytes)
        worker.meter.begin_transfer()
        target.meter.begin_transfer()
        worker.unsent += 1
        self._lines.send(Flow(worker.id, to, nbytes, worker.round, verdict))

    def _count_sent(self, worker: _Worker, target: _Worker, nbytes: int, messages: int = 1) -> None:
        worker.meter.sent(nbytes, messages)
        self._up_bytes[worker.id] += nbytes
        if self._sites.several:
            self._sites.sent(worker.id, target.id, nbytes)

    def _count_received(self, target: _Worker, nbytes: int) -> None:
        target.meter.received_bytes += nbytes
        self._down_bytes[target.id] += nbytes

    def _arrived(self, flow: Flow) -> None:
        source, target = self._workers[flow.source], self._workers[flow.to]
        self._count_received(target, flow.nbytes)
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
        others = links.to if links.to is links.source else {*links.to, *links.source}
        return tuple(sorted([worker, *others])), nbytes
