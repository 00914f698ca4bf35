"""With whom: the links of a round of gossip."""

from __future__ import annotations

import functools
import random
from abc import abstractmethod
from collections.abc import Collection
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field

from decentral.errors import ConfigError
from decentral.members import Members
from decentral.part import Part
from decentral.peer import Peer
from decentral.protocols.naming import part_named
from decentral.replica import seed_of


class Links(NamedTuple):
    """The workers that one worker sends to, and those it hears from, in ascending order; itself is never among them."""

    to: tuple[int, ...]
    source: tuple[int, ...]


def both_ways(workers: tuple[int, ...]) -> Links:
    return Links(workers, workers)


class Topology(Part):
    """Who talks to whom in a round. Every worker finds its links alone, from what all know: no message is needed."""

    @abstractmethod
    def links(self, peer: Peer, round_: int) -> Links:
        """Return the links of `peer` in round `round_` (counted from 1)."""


class All(Topology):
    """Everybody with everybody."""

    name = "all"

    def links(self, peer: Peer, round_: int) -> Links:
        return both_ways(tuple(member for member in peer.members if member != peer.id))


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

    def links(self, peer: Peer, round_: int) -> Links:
        group = _groups(peer.cohort, self.size, peer.seed, round_)[peer.id]
        return both_ways(tuple(worker for worker in group if worker != peer.id and worker in peer.members))


@functools.lru_cache(maxsize=256)
def _groups(cohort: Members, size: int, seed: int, round_: int) -> dict[int, tuple[int, ...]]:
    """Return everybody's group. Cached: in a simulation thousands of workers ask for the same round."""
    shuffled = list(cohort)
    random.Random(seed_of(seed, "groups", round_)).shuffle(shuffled)
    count = -(-len(shuffled) // size)
    groups = [tuple(sorted(shuffled[index::count])) for index in range(count)]
    return {member: group for group in groups for member in group}


class Ring(Topology):
    """Each worker with its two neighbours in ascending order, the last beside the first."""

    name = "ring"

    def links(self, peer: Peer, round_: int) -> Links:
        ids = _in_order(peer)
        place = ids.index(peer.id)
        around = {ids[place - 1], ids[(place + 1) % len(ids)]} - {peer.id}
        return both_ways(_here(peer, around))


class Exponential(Topology):
    """The directed exponential graph: worker i sends to i + 1, i + 2, i + 4, ... (mod N).

    With `one_peer` a round uses one of these offsets after the other, so each worker sends and hears once a round.
    Assran et al., Stochastic Gradient Push, arXiv 1811.10792; Ying et al., arXiv 2110.13363.
    """

    name = "exponential"
    one_peer: bool = False
    """Use one offset a round, in turn."""

    def links(self, peer: Peer, round_: int) -> Links:
        ids = _in_order(peer)
        place = ids.index(peer.id)
        offsets = [1 << power for power in range((len(ids) - 1).bit_length()) if 1 << power < len(ids)]
        if self.one_peer and offsets:
            offsets = [offsets[(round_ - 1) % len(offsets)]]
        to = {ids[(place + offset) % len(ids)] for offset in offsets}
        source = {ids[(place - offset) % len(ids)] for offset in offsets}
        return Links(_here(peer, to), _here(peer, source))


def _in_order(peer: Peer) -> list[int]:
    """Return the workers among which a fixed graph is drawn: the dead leave a gap that closes, the finished do not.

    A worker that is done leaves while slower ones have rounds to go; when they hear of it must not change their links.
    """
    return sorted({*peer.members, *peer.members.finished})


def _here(peer: Peer, workers: Collection[int]) -> tuple[int, ...]:
    """Return those of the workers that are in the run, in ascending order."""
    return tuple(sorted(worker for worker in workers if worker in peer.members))


def require_two(workers: int, rule: str) -> None:
    """Raise `ConfigError` when there is nobody to talk to."""
    if workers < 2:
        raise ConfigError(f"rule '{rule}' needs at least 2 workers, the fleet has {workers}; add to fleet.workers")


TOPOLOGIES: dict[str, type[Topology]] = {cls.name: cls for cls in (All, RandomGroups, Ring, Exponential)}
TopologyField = Annotated[Topology, BeforeValidator(lambda value: part_named(value, TOPOLOGIES, Topology, "topology"))]
