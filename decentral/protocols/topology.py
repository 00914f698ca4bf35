"""With whom: the links of a round of gossip."""

from __future__ import annotations

import functools
import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from pydantic import Field

from decentral.errors import ConfigError
from decentral.members import Members
from decentral.naming import Kind
from decentral.peer import Peer
from decentral.replica import seed_of


class Links(NamedTuple):
    """The workers that one worker sends to, and those it hears from, in ascending order; itself is never among them."""

    to: tuple[int, ...]
    source: tuple[int, ...]


def both_ways(workers: tuple[int, ...]) -> Links:
    return Links(workers, workers)


class Topology(Kind):
    """Who talks to whom in a round. Every worker finds its links alone, from what all know: no message is needed."""

    called = "topology"
    built_in: ClassVar[dict[str, type[Topology]]] = {}

    @property
    def pairs(self) -> bool:
        """Whether in every round each worker has one other at most, and that one has it."""
        return False

    @abstractmethod
    def links(self, peer: Peer, round_: int) -> Links:
        """Return the links of `peer` in round `round_` (counted from 1)."""

    def weights(self, peer: Peer, links: Links) -> dict[int, float]:
        """Return what each source counts for in a mean with the worker itself: 1 / (1 + sources) each."""
        return dict.fromkeys(links.source, 1 / (1 + len(links.source)))

    def neighbours(self, worker: int, ids: Sequence[int]) -> set[int]:
        """Return the worker's neighbours in the graph over the workers `ids`, whatever the directions and the round.

        `ids` are in ascending order.

        Raises `ConfigError` if there is another graph in every round.
        """
        raise ConfigError(
            f"rule.topology: '{self.spelling()}' is another graph in every round, and this rule needs one that stays: "
            "choose 'ring', 'torus', 'exponential', 'edges' or 'all'"
        )

    def check(self, workers: int) -> None:
        """Raise `ConfigError` if it is no graph over workers 0 .. workers - 1."""


class All(Topology):
    """Everybody with everybody."""

    name = "all"

    def links(self, peer: Peer, round_: int) -> Links:
        return both_ways(tuple(member for member in peer.members if member != peer.id))

    def neighbours(self, worker: int, ids: Sequence[int]) -> set[int]:
        return set(ids) - {worker}


class RandomGroups(Topology):
    """A fresh random partition into groups of `size` every round: random pairs by default.

    The run's workers are shuffled with a generator seeded by (seed, round), and the k-th goes to group k mod
    ceil(N / size). If `size` does not divide N some groups are one smaller; a group of one does not talk in this round.

    Those who have left are dealt into groups like everybody else. Otherwise workers that learn of a leave at different
    times would be dealt differently in the same round, and wait in circles until their patience ends.
    """

    name = "random_groups"
    size: int = Field(default=2, ge=2)
    """Workers in a group."""

    @property
    def pairs(self) -> bool:
        return self.size == 2

    def links(self, peer: Peer, round_: int) -> Links:
        group = _groups(peer.cohort, self.size, peer.seed, round_)[peer.id]
        mine, members = peer.id, peer.members
        return both_ways(tuple([worker for worker in group if worker != mine and worker in members]))


@functools.lru_cache(maxsize=256)
def _groups(cohort: Members, size: int, seed: int, round_: int) -> dict[int, tuple[int, ...]]:
    """Return everybody's group. Cached: in a simulation thousands of workers ask for the same round."""
    shuffled = list(cohort)
    random.Random(seed_of(seed, "groups", round_)).shuffle(shuffled)
    count = -(-len(shuffled) // size)
    groups = [tuple(sorted(shuffled[index::count])) for index in range(count)]
    return {member: group for group in groups for member in group}


def require_two(workers: int, rule: str) -> None:
    """Raise `ConfigError` when there is nobody to talk to."""
    if workers < 2:
        raise ConfigError(f"rule '{rule}' needs at least 2 workers, the fleet has {workers}; add to fleet.workers")


Topology.built_in.update({cls.name: cls for cls in (All, RandomGroups)})
TOPOLOGIES = Topology.built_in
