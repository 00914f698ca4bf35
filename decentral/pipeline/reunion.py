"""`Reunion`: how a row that has lost a worker comes together again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor

from decentral.errors import PeerGone
from decentral.journal import Rebuilt
from decentral.members import Members
from decentral.peer import Peer
from decentral.pipeline.recovery import Neighbour, Recovery
from decentral.pipeline.stage import Stage
from decentral.protocols.codecs import Float32
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

EXACT = Float32()
CHANNEL = "recovery"
PATIENCES = 20
"""What comes from another stage may take so many times a worker's patience: it may be in a long round, or replaced."""


class Lost(PeerGone):
    """Somebody of the row has left since its workers last met, and may come back."""


class Place(BaseModel):
    """Where a worker stands in its row.

    The local step that it does `next` (None: it has just come), and the whole gradient's norm in the one before; how
    long its own part of that gradient was, as `applied` after clipping; whether it `holds` its stage's parameters. With
    it goes where its rule stands: local steps done, rounds by channel, and the step at which it evaluates next.
    """

    next: NonNegativeInt | None
    norm: NonNegativeFloat = 0.0
    applied: NonNegativeFloat = 0.0
    holds: bool = True
    step: NonNegativeInt = 0
    rounds: dict[str, NonNegativeInt] = {}
    next_evaluation: NonNegativeInt = 0


class Reunion:
    """Meets the other workers of a row whenever one of them has been lost.

    Everybody tells everybody where it stands, and waits for all, those who are to come back too. From the same places
    all draw the same conclusions: the row goes on with the latest step that anybody does next, for all had agreed on
    the one before; who has come without its stage's parameters is sent those beside it, and rebuilds it from them.
    Who is lost meanwhile begins the next meeting: meetings are numbered by how often the row has lost somebody.
    """

    def __init__(self, peer: Peer, stage: Stage, row: tuple[int, ...], recovery: Recovery | None) -> None:
        self._peer, self._stage, self._row, self._recovery = peer, stage, row, recovery
        self._look_round()
        self.waits = False
        """Whether the worker does nothing but wait for others of its row."""

    async def meet(self, place: Place) -> tuple[int, float]:
        """Return which local step the row does next, and the norm of the whole gradient in the one before.

        Raises `PeerGone` when the row cannot come together, or nobody can rebuild what it has lost.
        """
        while True:
            self._look_round()
            if self._peer.id not in self._peer.everybody:
                raise PeerGone(f"worker {self._peer.id} has been declared dead by the others")
            try:
                places = await self._places(place)
                return await self._settle(places, place)
            except Lost:
                continue

    async def recv(self, source: int, tag: Tag) -> Packet:
        """Return what comes from another worker of the row; raises `Lost` when any of them has left or leaves."""
        return await self._received(source, tag, source)

    def refused(self, source: int, error: FrameError) -> PeerGone:
        """Count what another worker of the row should not have sent, and return what to raise."""
        self._peer.refuse(source, error)
        return PeerGone(f"of its replica, {self._name(source)} sent what cannot be read: {error}")

    def _look_round(self) -> None:
        now = self._peer.everybody
        self._since = Members(now.epoch, self._row, now.finished, now.departed)
        self.losses = self._count_losses()
        """How often the row has lost somebody, as known when its workers last met."""

    def _count_losses(self) -> int:
        now = self._peer.everybody
        gone, finished = (sum(worker in self._row for worker in those) for those in (now.departed, now.finished))
        return gone - finished

    async def _places(self, place: Place) -> dict[int, Place]:
        """Tell everybody of the row our place, and return all of theirs, by stage."""
        peer = self._peer
        rule = {"step": peer.step, "rounds": peer.rounds_settled, "next_evaluation": peer.next_evaluation}
        mine = signal(place.model_copy(update=rule).model_dump_json())
        told = {worker for worker in self._row if worker in peer.everybody}
        places = {}
        for worker in sorted(told - {peer.id}):
            peer.send(worker, self._tag(peer.id, "place"), mine)
        for stage, worker in enumerate(self._row):
            if worker == peer.id:
                places[stage] = place
                continue
            packet = await self._received(None, self._tag(worker, "place"), worker)  # it may not be there yet
            places[stage] = self._read(worker, packet)
            if worker not in told:
                peer.send(worker, self._tag(peer.id, "place"), mine)
        return places

    async def _settle(self, places: Mapping[int, Place], mine: Place) -> tuple[int, float]:
        settled = [place for place in places.values() if place.next is not None]
        if not settled:
            raise PeerGone("nobody of its replica is left who knows where it was; go on from a checkpoint")
        latest = max(settled, key=lambda place: place.next or 0)
        assert latest.next is not None
        if latest.next:  # before the first step everybody has what is needed
            try:
                await self._rebuild(places)
            except Lost:
                raise
            except PeerGone:
                await self._part()
                raise
        if not mine.holds:
            self._peer.stand_at(latest.step, latest.rounds)
        if mine.next is None:
            self._peer.next_evaluation = latest.next_evaluation
        self._peer.close(CHANNEL, self.losses)
        return latest.next, latest.norm

    async def _rebuild(self, places: Mapping[int, Place]) -> None:
        """Give those who have lost their stages what they need, and rebuild our own if it is lost."""
        assert self._recovery is not None
        holders = [stage for stage, place in places.items() if place.holds]
        for lost in sorted(places.keys() - set(holders)):
            sources = self._recovery.sources(lost, holders)
            for source in sources:
                if self._row[source] == self._peer.id:
                    packet = EXACT.encode(self._stage.params)
                    self._peer.send(self._row[lost], self._tag(self._row[lost], f"params {source}"), packet)
            if self._row[lost] == self._peer.id:
                parts = [Neighbour(source, await self._params(source), places[source].applied) for source in sources]
                self._stage.begin_anew(self._recovery, parts)
                members = tuple(self._row[source] for source in sources)
                self._peer.record(Rebuilt(time_s=self._peer.now(), worker=self._peer.id, stage=lost, members=members))

    async def _part(self) -> None:
        """There is no way to go on: leave when the others know that too, for they would wait for us to come back."""
        others = [worker for worker in self._row if worker != self._peer.id]
        for worker in others:
            self._peer.send(worker, self._tag(self._peer.id, "ends"), signal(""))
        for worker in others:
            with suppress(PeerGone, TimeoutError):
                await self._peer.recv(worker, self._tag(worker, "ends"))

    async def _params(self, stage: int) -> Tensor:
        worker, numel = self._row[stage], self._stage.cut.layouts[stage].size
        packet = await self._received(worker, self._tag(self._peer.id, f"params {stage}"), worker)
        try:
            if packet.numel != numel:
                raise FrameError("length", f"{packet.numel} elements where there are {numel}")
            return EXACT.decode(packet, self._stage.vector(numel))
        except FrameError as error:
            raise self.refused(worker, error) from None

    def _read(self, worker: int, packet: Packet) -> Place:
        try:
            return Place.model_validate_json(signal_text(packet))
        except FrameError as error:
            raise self.refused(worker, error) from None
        except ValidationError:
            raise self.refused(worker, FrameError("codec", "its place is not what it should be")) from None

    async def _received(self, source: int | None, tag: Tag, whose: int) -> Packet:
        """Return what worker `whose` sends, who need not be there yet if `source` is None."""
        self.waits = True
        self._peer.rest_amid_phase()
        try:
            while True:
                try:
                    return (await self._peer.recv(source, tag, PATIENCES * self._peer.patience_s, self._since))[1]
                except PeerGone:
                    if self._count_losses() > self.losses or (
                        source is not None and source not in self._peer.everybody
                    ):
                        raise
                    self._look_round()  # somebody of the row has finished, and needs nothing of us
        except PeerGone:
            lost = f"its replica has lost {self._name(whose)}"
            raise (PeerGone if self._recovery is None else Lost)(lost) from None
        except TimeoutError:
            raise PeerGone(f"of its replica, {self._name(whose)} does not come, or does not answer") from None
        finally:
            self.waits = False

    def _tag(self, worker: int, part: str) -> Tag:
        return Tag(CHANNEL, self.losses, f"{part} {worker}")

    def _name(self, worker: int) -> str:
        return f"stage {self._row.index(worker)}, worker {worker}"
