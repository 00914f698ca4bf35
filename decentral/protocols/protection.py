"""Parity beside a rule: groups of workers keep for each other what is each one's own, in both worlds.

Every so many rounds a worker at rest copies its own state, and its group makes a generation of parity of it while
they train on (see `parity.py`). Who has lost that state with its machine comes back as any newcomer does, with a
host's state, and has its own rebuilt before it runs the rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from pydantic import Field

from decentral.errors import PeerGone
from decentral.journal import Restored
from decentral.part import Section
from decentral.peer import Peer
from decentral.protocols.parity import Parity, parity_groups


class ParityGroups(Section):
    """Which workers keep each other's own state, and how often."""

    workers: int | None = Field(default=None, ge=2)
    """Workers of a group, of which any one that is lost gets back what was its alone; unset: nobody does. What is left
    over of the fleet is spread over the groups."""
    every: int = Field(default=10, ge=1)
    """Rounds between two generations of parity. With AdamW one is as many bytes as a round in float32: at 10 a worker
    sends a tenth more, and who is lost goes back to where it was ten rounds ago at most."""


class Guard:
    """One worker's part in its group's protection: a keeper of the peer, and what a newcomer asks for its own state."""

    def __init__(self, peer: Peer, groups: ParityGroups, places: Mapping[int, str]) -> None:
        """Protect `peer`, which is what it goes on from. `places`, where workers are, must be equal for all of them."""
        assert groups.workers is not None
        all_groups = parity_groups(peer.cohort.ids, groups.workers, places)
        self._group = next(group for group in all_groups if peer.id in group)
        self._peer, self._every = peer, groups.every
        self._parity = Parity(peer, self._group)
        self._last: int | None = self._number
        self._making: asyncio.Task[bool] | None = None
        peer.keepers.append(self)
        peer.guard = self
        peer.spawn(self._parity.serve())

    def rest(self) -> None:
        """Begin the generation that is due; the others are told if it cannot be made."""
        number, last = self._number, self._last
        if number == last:
            return
        self._last = number
        busy = self._making is not None and not self._making.done()
        everybody = all(member in self._peer.members for member in self._group)
        if last is None or busy or not everybody:  # a newcomer's first rest may be later than the others'
            self._parity.pass_over(number)
        else:
            self._making = self._peer.spawn(self._parity.protect(number))

    async def entered(self) -> None:
        """Have the newcomer be what it was alone, or go on as its host if that cannot be; the journal says which."""
        self._last = None
        generation, reason = None, ""
        try:
            generation = await self._parity.rebuild()
        except PeerGone as error:
            reason = str(error)
        peer = self._peer
        peer.record(Restored(time_s=peer.now(), worker=peer.id, generation=generation, reason=reason))

    @property
    def _number(self) -> int:
        """The newest generation that is due: a group agrees on it because rounds have the same numbers everywhere."""
        return max(self._peer.rounds_settled.values(), default=0) // self._every
