"""The syncer of Decoupled DiLoCo: owns the global fragments, pulls and merges one after the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from decentral.errors import PeerGone
from decentral.protocols.collectives import Contribution
from decentral.protocols.hosting import GLOBALS, deliver
from decentral.protocols.merge import radial_mean, weighted_mean
from decentral.wire import SIGNAL, FrameError, Packet, Tag, signal, signal_text

if TYPE_CHECKING:
    from decentral.protocols.decoupled_diloco import DecoupledDiLoCo
    from decentral.protocols.learner import Learner


def down(host: int) -> str:
    """Return the channel on which the syncer at worker `host` talks to learners."""
    return f"syncer {host}"


def up(host: int) -> str:
    """Return the channel on which learners talk to it."""
    return f"learners {host}"


class Syncer:
    """One coroutine beside the rule of the lowest member; `learner` is that worker's own.

    In round t it pulls fragment (t - 1) mod P from all learners, merges what comes, and sends the result to all.
    """

    def __init__(self, rule: DecoupledDiLoCo, learner: Learner) -> None:
        self._rule, self._learner, self._peer = rule, learner, learner.peer
        layout = self._peer.layout
        self._fragments = learner.fragments
        self._tensors = [fragment.tensors(layout) for fragment in self._fragments]
        self._outers = [rule.outer.fit([stop - start for start, stop in spans]) for spans in self._tensors]
        self._layers = layout.layers()
        self._global = self._peer.slot("global", learner.anchor)
        self._momentum = self._peer.slot("momentum")
        self._quorum_s = self._sync_s = 0.0  # from launch to quorum, from merge to the last arrival: running means

    async def serve(self) -> None:
        """Go on until every learner says that it has nothing more."""
        gap = self._rule.period / len(self._fragments)
        due = self._learner.step + gap
        done = False
        for round_ in itertools.count(1):
            await self._floor(due, gap)
            due = max(due, self._learner.step - self._rule.overlap) + gap
            index = (round_ - 1) % len(self._fragments)
            self._tell(round_, "launch", signal("launch"))
            contributions, done = await self._collect(round_, index)
            result = self._merged(contributions, index) if contributions else signal("end" if done else "nothing")
            sends = self._tell(round_, "global", result)
            self._peer.spawn(self._measure_sync(sends, self._peer.now()))
            outcome = "committed" if contributions else "skipped"
            members = [each.worker for each in contributions] or self._peer.members.ids
            self._peer.ended_round(up(self._peer.id), round_, outcome, members)
            if done:
                return

    async def _floor(self, due: float, gap: float) -> None:
        """Wait until this worker has come to step `due`; once its budget is spent, for as long as `gap` steps took."""
        while self._learner.step < due and not self._learner.finished:
            self._learner.border.clear()
            await self._learner.border.wait()
        if self._learner.step < due:
            await asyncio.sleep(gap * self._learner.step_s)

    def _tell(self, round_: int, part: str, packet: Packet) -> list[asyncio.Future[None]]:
        tag = Tag(down(self._peer.id), round_, part)
        sends = [deliver(self._peer, member, tag, packet) for member in self._peer.members]
        return [send for send in sends if send is not None]

    async def _measure_sync(self, sends: Sequence[asyncio.Future[None]], began: float) -> None:
        await asyncio.gather(*sends, return_exceptions=True)
        self._sync_s = (self._sync_s + self._peer.now() - began) / 2

    async def _collect(self, round_: int, index: int) -> tuple[list[Contribution], bool]:
        """Return what came until the grace after the quorum was over, and whether no learner has anything more."""
        pending = {self._peer.spawn(self._answer(member, round_, index)) for member in self._peer.members}
        came: list[Contribution] = []
        done, began, left_s = True, self._peer.now(), None
        while pending and (left_s is None or left_s > 0):
            ended, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            answers = [answer.result() for answer in ended]
            came += [answer for answer in answers if isinstance(answer, Contribution)]
            done = done and all(answer == "done" for answer in answers)
            if len(came) >= self._rule.quorum:
                if left_s is None:
                    self._quorum_s = (self._quorum_s + self._peer.now() - began) / 2
                    until = self._peer.now() + self._grace_s()
                left_s = until - self._peer.now()
        for answer in pending:
            answer.cancel()
        return sorted(came, key=lambda each: each.worker), done and not pending

    def _grace_s(self) -> float:
        """Return gamma (tau step_s - quorum_s - sync_s), within 0 .. patience: what a learner's own steps hide."""
        slack_s = self._rule.overlap * self._learner.step_s - self._quorum_s - self._sync_s
        return min(max(0.0, self._rule.grace * slack_s), self._peer.patience_s)

    async def _answer(self, member: int, round_: int, index: int) -> Contribution | str:
        """Return a learner's contribution; "nothing" if it has none now, "done" if it will have none any more."""
        try:
            _, packet = await self._peer.recv(member, Tag(up(self._peer.id), round_, "push"))
            if packet.codec == SIGNAL:
                return signal_text(packet)
            values = self._rule.codec.decode(packet, self._fragments[index].read(self._global))
            return Contribution(member, values, packet.weight)
        except FrameError as error:
            self._peer.refuse(member, error)
            return "nothing"
        except (PeerGone, TimeoutError):
            return "done"  # what takes more than all our patience must not keep the run from ending

    def _merged(self, contributions: Sequence[Contribution], index: int) -> Packet:
        """Take an outer step on one fragment of the global model, and return it as it travels."""
        fragment = self._fragments[index]
        values, weights = [each.values for each in contributions], [each.weight for each in contributions]
        merged = weighted_mean(values, weights)
        if self._rule.radial and isinstance(merged, Tensor):
            place = 0
            for start, stop in self._tensors[index]:
                part = slice(place, place + stop - start)
                place = part.stop
                if any(first <= start and stop <= last for first, last in self._layers):
                    merged[part] = radial_mean([each[part] for each in values], weights)
        current, momentum = fragment.read(self._global), fragment.read(self._momentum)
        self._outers[index].step(current, merged, momentum)
        fragment.write(self._global, current)
        fragment.write(self._momentum, momentum)
        return GLOBALS.encode(current)
