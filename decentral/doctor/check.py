"""The one interface of all that is looked at on nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from decentral.config import Run
from decentral.doctor.finding import Finding

Seen = dict[str, Any]
"""What a check has seen on a node: numbers, texts, and lists and maps of them, for it travels as msgpack."""


class Check(ABC):
    """Something that may be wrong with nodes."""

    name: ClassVar[str]

    @abstractmethod
    def look(self, run: Run) -> Seen:
        """Return how it is on this node, where a worker of the run may be. What fails is part of the answer."""

    @abstractmethod
    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        """Yield what is to be said of what was seen, by name of the node."""

    def ok(self, what: str) -> Finding:
        return Finding(self.name, "ok", what)

    def warning(self, what: str, advice: str) -> Finding:
        return Finding(self.name, "warning", what, advice)

    def problem(self, what: str, advice: str) -> Finding:
        return Finding(self.name, "problem", what, advice)
