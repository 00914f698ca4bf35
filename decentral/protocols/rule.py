"""`SyncRule`: the base of every rule."""

from __future__ import annotations

from abc import abstractmethod

from decentral.part import Part
from decentral.peer import Peer
from decentral.state import Layout


class SyncRule(Part):
    """How workers train together. Its fields are its hyper-parameters; what it remembers lives in the peer's slots.

    Subclass it, write `run` against `Peer`, and name it in the run file as `module:Class`. The same object drives every
    worker, in both worlds.
    """

    @abstractmethod
    async def run(self, peer: Peer) -> None:
        """Drive one worker until `peer.train` (or `peer.backward`) says that the budget is spent."""

    def check(self, workers: int) -> None:
        """Refuse, with `ConfigError`, what this rule cannot do with so many workers. Called when a run file is read."""

    def check_layout(self, layout: Layout) -> None:
        """Refuse, with `ConfigError`, a model this rule cannot train. Called before the first step."""
