"""Where a training loop and a rule, each in a thread of its own, hand the replica to each other."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple


class LoopLeft(Exception):
    """The training loop is over; nobody does what it is asked for any more."""


class Answer(NamedTuple):
    """So many local steps were done; `loss` is the mean of their losses (None: the loop has told none)."""

    steps: int = 0
    loss: float | None = None


@dataclass(eq=False)
class Train:
    """Do so many local steps, the first of which is the replica's local step `step`; answer what was done.

    Before, take over parameters and running means; the optimiser shall believe that it has done `inner_steps` (None: as
    many as it has).
    """

    step: int
    steps: int
    inner_steps: int | None = None
    answer: Future[Answer] = field(default_factory=Future)


@dataclass(eq=False)
class Look:
    """Copy the running mean of that name, now and at the end of every phase from now on; answer anything."""

    name: str
    answer: Future[Answer] = field(default_factory=Future)


@dataclass(eq=False)
class End:
    """The worker has left the run: with what error, if it did not come to its end; None otherwise."""

    error: BaseException | None


class Gate:
    """Orders go to the loop, one at a time; the rule's side waits until each is answered."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[Train | Look | End] = SimpleQueue()
        self._closed = False
        self.ended = False
        """Whether there is, or was, an `End` among the orders."""

    def ask(self, order: Train | Look) -> Answer:
        """Return the loop's answer. The rule's side; raises `LoopLeft` when there is none."""
        self._orders.put(order)
        if self._closed:
            self._turn_away()
        return order.answer.result()

    def end(self, error: BaseException | None) -> None:
        """The rule's side: nothing comes any more."""
        self.ended = True
        self._orders.put(End(error))

    def take(self) -> Train | Look | End:
        """Return the next order, when it comes. The loop's side."""
        return self._orders.get()

    def close(self) -> None:
        """The loop's side: no order is answered any more."""
        self._closed = True
        self._turn_away()

    def _turn_away(self) -> None:
        while True:
            try:
                order = self._orders.get_nowait()
            except Empty:
                return
            if not isinstance(order, End):
                order.answer.set_exception(LoopLeft())
