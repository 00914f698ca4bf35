"""`Coder`: a codec at work on one fragment at one worker, with what it remembers from round to round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from decentral.members import Members
from decentral.protocols.codecs.codec import Codec
from decentral.wire import Packet

SlotMaker = Callable[[str, Tensor], Tensor]
"""`slot(name, like)`: a buffer of that name, a copy of `like` at first. It is saved with the worker's replica."""
RESIDUAL = "residual"
"""The slot of what has been left unsent and is added to what is sent next: the sum is the same whoever sends it."""


class Reduce(Protocol):
    """One attempt at a mean over `members`: how a coder talks. All members call it equally often, in the same order."""

    @property
    def members(self) -> Members: ...

    @property
    def seed(self) -> int:
        """The same at every member, another one in every round."""

    async def __call__(self, values: Tensor, codec: Codec) -> Tensor:
        """Return the mean of the members' `values` `[n]`, each as `codec` brings it: the same bits for every member."""


class Coder:
    """Makes means of vectors by way of `codec`. This one remembers nothing; others override what they need.

    A round calls `mean` once for each attempt at it, with the same values, and then one of `commit` (the mean was
    used), `abort` (it was not, and nobody will hand in these values again) and `undo` (it was not, and the values are
    the caller's again). What was handed in is never lost: used + remembered + handed back = handed in.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    async def mean(self, values: Tensor, reduce: Reduce) -> Tensor:
        """Return the mean of the members' `values` `[n]`; changes nothing that is remembered."""
        return await reduce(values, self.codec)

    def encode(self, values: Tensor) -> Packet:
        """Return the packet by which `values` `[n]` go to one receiver, instead of into a mean; changes nothing."""
        return self.codec.encode(values)

    def commit(self) -> None:
        """What was encoded last has been used."""

    def abort(self) -> None:
        """What was encoded last has not been used: remember all of it."""

    def undo(self) -> None:
        """What was encoded last has not been used, and will be handed in again."""
