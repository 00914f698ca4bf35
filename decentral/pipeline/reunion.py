"""`Reunion`: how a party of workers that has lost one comes together again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor

from decentral.errors import PeerGone
from decentral.grid import Grid
from decentral.journal import Rebuilt
from decentral.members import Members
from decentral.peer import Peer
from decentral.pipeline.followers import Follower, unpacked
from decentral.pipeline.recovery import Follows, Neighbour, Recovery
from decentral.pipeline.stage import Copied, Stage
from decentral.protocols.codecs import Float32
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

EXACT = Float32()
CHANNEL = "recovery"
PATIENCES = 20
"""What comes from another stage may take so many times a worker's patience: it may be in a long round, or replaced."""


class Lost(PeerGone):
    """Somebody of the party has left since its workers last met, and may come back."""


class Place(BaseModel):
    """Where a worker stands in its party.

    The local step that it does `next` (None: it has just come), and the whole gradients' norms in the one before, by
    replica; how long its own part of that gradient was, as `applied` after clipping; whether it `holds` its stage's
    parameters. With it goes where its rule stands: local steps done, rounds by channel, the step at which its row
    evaluates next, and whether it has before.
    """

    next: NonNegativeInt | None
    norms: dict[NonNegativeInt, NonNegativeFloat] = {}
    applied: NonNegativeFloat = 0.0
    holds: bool = True
    step: NonNegativeInt = 0
    rounds: dict[str, NonNegativeInt] = {}
    next_evaluation: NonNegativeInt = 0
    has_evaluated: bool = False


class Reunion:
    """Meets the other workers of a party whenever one of them has been lost: those who do each local step together.

    Everybody tells everybody where it stands, and waits for all, those who are to come back too. From the same places
    all draw the same conclusions: the party goes on with the latest step that anybody does next, for all had agreed on
    the one before; who has come without its stage's parameters is sent what its row has that rebuilds them.
    Who is lost meanwhile begins the next meeting: meetings are numbered by how often the party has lost somebody.
    """

    def __init__(
        self,
        peer: Peer,
        stage: Stage,
        party: tuple[int, ...],
        recovery: Recovery | None,
        followers: Sequence[Follower],
    ) -> None:
        self._peer, self._stage, self._party, self._recovery = peer, stage, party, recovery
        self._grid, self._followers = Grid(stage.cut.stages), followers
        self._look_round()
        self.waits = False
        """Whether the worker does nothing but wait for others of its party."""

    async def meet(self, stand: Callable[[], Place], catch_up: Callable[[Place], Awaitable[None]]) -> Place:
        """Return the place of who is furthest, whose next step is the one that the party does.

        `stand` says where we are; `catch_up` does the step that others have done already, before anybody is given what
        we have. Raises `PeerGone` when the party cannot come together, or nobody can rebuild what it has lost.
        """
        while True:
            self._look_round()
            if self._peer.id not in self._peer.everybody:
                raise self._peer.declared_dead()
            try:
                place = stand()
                return await self._settle(await self._places(place), place, catch_up)
            except Lost:
                continue

    async def recv(self, source: int, tag: Tag) -> Packet:
        """Return what comes from another worker of the party; raises `Lost` when any of them has left or leaves."""
        return await self._received(source, tag, source)

    def refused(self, source: int, error: FrameError) -> PeerGone:
        """Count what another worker of the party should not have sent, and return what to raise."""
        self._peer.refuse(source, error)
        return PeerGone(f"of its replica, {self._name(source)} sent what cannot be read: {error}")

    def _look_round(self) -> None:
        now = self._peer.everybody
        self._since = Members(now.epoch, self._party, now.finished, now.departed)
        self.losses = self._count_losses()
        """How often the party has lost somebody, as known when its workers last met."""

    def _count_losses(self) -> int:
        now = self._peer.everybody
        gone, finished = (sum(worker in self._party for worker in those) for those in (now.departed, now.finished))
        return gone - finished

    async def _places(self, place: Place) -> dict[int, Place]:
        """Tell everybody of the party our place, and return all of theirs, by worker."""
        peer = self._peer
        rule = {"step": peer.step, "rounds": peer.rounds_settled}
        evaluation = {"next_evaluation": peer.next_evaluation, "has_evaluated": peer.has_evaluated}
        mine = signal(place.model_copy(update={**rule, **evaluation}).model_dump_json())
        told = {worker for worker in self._party if worker in peer.everybody}
        places = {}
        for worker in sorted(told - {peer.id}):
            peer.send(worker, self._tag(peer.id, "place"), mine)
        for worker in self._party:
            if worker == peer.id:
                places[worker] = place
                continue
            packet = await self._received(None, self._tag(worker, "place"), worker)  # it may not be there yet
            places[worker] = self._read(worker, packet)
            if worker not in told:
                peer.send(worker, self._tag(peer.id, "place"), mine)
        return places

    async def _settle(
        self, places: Mapping[int, Place], mine: Place, catch_up: Callable[[Place], Awaitable[None]]
    ) -> Place:
        settled = [place for place in places.values() if place.next is not None]
        if not settled:
            raise PeerGone("nobody of its replica is left who knows where it was; go on from a checkpoint")
        latest = max(settled, key=lambda place: place.next or 0)
        if mine.next is not None and mine.next != latest.next:
            await catch_up(latest)
        if not mine.holds:
            self._peer.stand_at(latest.step, latest.rounds)
        if latest.next:  # before the first step everybody has what is needed
            try:
                for worker, place in sorted(places.items()):
                    if not place.holds:
                        await self._rebuild(worker, places)
            except Lost:
                raise
            except PeerGone:
                await self._part()
                raise
        row = [places[worker] for worker in self._grid.row(self._peer.id) if places[worker].next is not None]
        if mine.next is None and row:  # another row may have nothing to evaluate
            self._peer.next_evaluation = max(place.next_evaluation for place in row)
            self._peer.has_evaluated = any(place.has_evaluated for place in row)
        self._peer.close(CHANNEL, self.losses)
        return latest

    async def _rebuild(self, lost: int, places: Mapping[int, Place]) -> None:
        """Give a worker that has lost its stage what we have for it; or rebuild our own, if it is ours."""
        assert self._recovery is not None
        cut, stage, row = self._stage.cut, self._grid.stage(lost), self._grid.row(lost)
        holders = [other for other, worker in enumerate(row) if places[worker].holds]
        sources = self._recovery.sources(cut, stage, holders)
        kept = next((follows for follows in self._recovery.follows(cut) if follows.stage == stage), None)
        if kept is not None and (kept.keeper not in holders or places[row[kept.keeper]].next is None):
            raise PeerGone(
                f"stage {stage} of its replica is lost and so is stage {kept.keeper}, which kept a copy for it; go on "
                "from a checkpoint"
            )
        if self._peer.id != lost:
            if self._peer.id in [row[source] for source in sources]:
                self._peer.send(lost, self._tag(lost, f"params {self._peer.id}"), EXACT.encode(self._stage.params))
            for follower in self._followers:
                if follower.follows.stage == stage and self._peer.id in row:
                    for number, packet in enumerate(follower.state()):
                        self._peer.send(lost, self._tag(lost, f"copy {number}"), packet)
            return
        parts = []
        for source in sources:
            values = await self._vector(row[source], f"params {row[source]}", cut.layouts[source].size)
            parts.append(Neighbour(source, values, places[row[source]].applied))
        copy = None if kept is None else await self._copy(row[kept.keeper], kept)
        self._stage.begin_anew(self._recovery, parts, copy)
        for name, values in ({} if copy is None else copy.slots).items():
            self._peer.slot(name, values)
        helpers = sorted({*sources, *([] if kept is None else [kept.keeper])})
        members = tuple(row[source] for source in helpers)
        self._peer.record(Rebuilt(time_s=self._peer.now(), worker=self._peer.id, stage=stage, members=members))

    async def _copy(self, keeper: int, kept: Follows) -> Copied:
        async def told(number: int) -> Packet:
            return await self._received(keeper, self._tag(self._peer.id, f"copy {number}"), keeper)

        try:
            return await unpacked(kept, told, self._stage)
        except FrameError as error:
            raise self.refused(keeper, error) from None

    async def _part(self) -> None:
        """There is no way to go on: leave when the others know that too, for they would wait for us to come back."""
        others = [worker for worker in self._party if worker != self._peer.id]
        for worker in others:
            self._peer.send(worker, self._tag(self._peer.id, "ends"), signal(""))
        for worker in others:
            with suppress(PeerGone, TimeoutError):
                await self._peer.recv(worker, self._tag(worker, "ends"))

    async def _vector(self, worker: int, part: str, numel: int) -> Tensor:
        packet = await self._received(worker, self._tag(self._peer.id, part), worker)
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
                    self._look_round()  # somebody of the party has finished, and needs nothing of us
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
        return f"stage {self._grid.stage(worker)}, worker {worker}"
