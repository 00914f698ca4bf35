"""`SyncRule`: the base of every rule."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from decentral.errors import ConfigError
from decentral.part import Part
from decentral.peer import Peer
from decentral.state import Layout

Newcomers = Literal["none", "at once", "follow"]


class SyncRule(Part):
    """How workers train together. Its fields are its hyper-parameters; what it remembers lives in the peer's slots.

    Subclass it, write `run` against `Peer`, and name it in the run file as `module:Class`. The same object drives every
    worker, in both worlds.
    """

    newcomers: ClassVar[Newcomers] = "none"
    """Whether a worker may come into a run that has begun, with another's state: "follow" in rules that vote on their
    rounds, which it hears until it takes part; "at once" in rules that need no vote; "none" if it cannot."""

    @abstractmethod
    async def run(self, peer: Peer) -> None:
        """Drive one worker until `peer.train` (or `peer.backward`) says that the budget is spent."""

    def check(self, workers: int) -> None:
        """Refuse, with `ConfigError`, what this rule cannot do with so many workers. Called when a run file is read."""

    def check_newcomers(self) -> None:
        """Refuse, with `ConfigError`, a fleet to which workers come after the start, if the rule cannot take them."""
        if self.newcomers == "none":
            raise ConfigError(
                f"rule: '{self.spelling()}' cannot take a worker into a run that has begun, and this fleet brings some "
                "(fleet.churn, start_s of a group, or a 'join' event); take them out, or a rule that can, such as "
                "'diloco', 'streaming_diloco', 'noloco', 'gossip' or 'ddp'"
            )

    def check_layout(self, layout: Layout) -> None:
        """Refuse, with `ConfigError`, a model this rule cannot train. Called before the first step."""
