"""`Stock`: one worker's sample leases, asked for a phase ahead, used in their order, and accounted for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from decentral.journal import Leased, Lost, Record, Settled
from decentral.leases import Grant, Ranges, Request
from decentral.replica import Replica

Lessor = Callable[[Request], Awaitable[Grant]]
"""Brings a request to the run's `LeaseBook` and returns its answer, when it comes."""

Occasion = tuple[str, int]
"""What samples went into: a channel and its round."""


class Owner(Protocol):
    """Whose leases these are."""

    @property
    def id(self) -> int: ...
    def now(self) -> float: ...
    def record(self, record: Record) -> None: ...
    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...


class Stock:
    """The leases of one stay in the run. `ask` talks to the book; `replica` is told which samples its steps take.

    `bounded`: the stream ends, and then so does the run.

    Samples are settled in the order in which they were trained on. A round settles all that had been trained on when
    the worker handed something in to it, and what an earlier round has settled is settled: they may overlap.
    """

    def __init__(self, owner: Owner, replica: Replica, ask: Lessor, *, bounded: bool) -> None:
        self._owner, self._replica, self._ask, self._bounded = owner, replica, ask, bounded
        self._batch_size = replica.batch_size
        self._held = Ranges()  # not trained on
        self._granted = self._trained = self._decided = self._in_hand = 0
        self._into: dict[Occasion, int] = {}  # how many samples had been trained on, those of the gradient in hand too
        self._fates: deque[tuple[int, type[Settled] | type[Lost]]] = deque()
        self._asking: asyncio.Task[None] | None = None
        self.last_step: int | None = None
        """The local step with which every worker's run ends; None while the stream is not used up."""

    # -- before training ---------------------------------------------------------------------------------------------

    async def provide(self, step: int, steps: int, ahead: int) -> int:
        """Have samples for local steps from `step` on; return for how many: `steps`, or fewer if the stream is used up.

        Those for `ahead` more steps are asked for as well, so that they are here when these are done.
        """
        need, wish = steps * self._batch_size, (steps + ahead) * self._batch_size
        while len(self._held) < need:
            await self._request(step, wish)
            if self.last_step is not None:
                break
        if len(self._held) < wish and self.last_step is None:
            self._request(step, wish)
        place = step
        for start, stop in self._held.first(need):
            self._replica.lease(place, start)
            place += (stop - start) // self._batch_size
        return place - step

    async def look(self, step: int) -> None:
        """Know whether the run ends with local step `step`, before anybody asks how many are left.

        So all workers know it at the same step: each has a lease beyond it, or has been told that there is none.
        """
        if self._bounded and self.last_step is None and not len(self._held):
            await self._request(step, 0)

    def _request(self, step: int, wish: int) -> asyncio.Task[None]:
        """Ask for as many samples as `wish` is more than what is here, if nothing is asked for already."""
        if self._asking is None or self._asking.done():
            held = len(self._held)
            wanted = self._granted + max(0, wish - held)
            request = Request(self._owner.id, self._granted, wanted, step + held // self._batch_size)
            self._asking = self._owner.spawn(self._fetch(request))
        return self._asking

    async def _fetch(self, request: Request) -> None:
        grant = await self._ask(request)
        self._held.extend(grant.ranges)
        for start, stop in grant.ranges:
            self._granted += stop - start
            self._owner.record(Leased(time_s=self._owner.now(), worker=self._owner.id, start=start, stop=stop))
        self.last_step = grant.last_step

    # -- after training ----------------------------------------------------------------------------------------------

    def computed(self) -> None:
        """A gradient of the next local step is in hand: what is handed in now holds it."""
        self._in_hand = self._batch_size

    def trained(self, samples: int) -> None:
        """So many samples more are trained on."""
        self._in_hand = 0
        self._held.take(samples)
        self._trained += samples
        self._decide()

    def handed_in(self, into: Occasion) -> None:
        """What has been trained on so far goes into that."""
        self._into[into] = self._trained + self._in_hand

    def ended(self, into: Occasion, fate: type[Settled] | type[Lost] | None) -> None:
        """What had been handed in is settled, or lost; None: neither, it will be handed in again."""
        upto = self._into.pop(into, None)
        if upto is not None and fate is not None:
            self._fates.append((upto, fate))
            self._decide()

    @property
    def is_settled(self) -> bool:
        """Whether nothing that was trained on would be lost with the worker."""
        return self._decided == self._trained

    def finish(self) -> None:
        """The worker has finished: nothing of what it trained on will be lost."""
        self._fates.append((self._trained, Settled))
        self._decide()

    def _decide(self) -> None:
        """Journal the fates of what has been trained on: that of a gradient comes before it is used."""
        while self._fates and self._fates[0][0] <= self._trained:
            upto, fate = self._fates.popleft()
            if upto > self._decided:
                samples, self._decided = upto - self._decided, upto
                self._owner.record(fate(time_s=self._owner.now(), worker=self._owner.id, samples=samples))
