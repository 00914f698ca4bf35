"""Which way a microbatch takes through the stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from random import Random
from typing import ClassVar, Literal, NamedTuple

from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.grid import Grid
from decentral.naming import Kind
from decentral.pipeline.cut import Cut
from decentral.protocols.codecs import Codec
from decentral.replica import seed_of

BACK = 2.0
"""A pass back takes so many times as long as one forward: it computes two products for each."""
FORWARD_SHARE = 1 / (1 + BACK)
"""Share of a local step's time that the forward pass takes."""


class Hop(NamedTuple):
    """A worker, and the blocks that it runs: `start .. stop - 1`."""

    worker: int
    start: int
    stop: int

    @property
    def blocks(self) -> range:
        return range(self.start, self.stop)


class Path(NamedTuple):
    """The way of one microbatch of a replica's batch: forward hop by hop, and back the same way."""

    replica: int
    microbatch: int
    hops: tuple[Hop, ...]


class Action(NamedTuple):
    """One pass through a hop: the path's number among all, and the hop's on it."""

    kind: Literal["forward", "backward"]
    path: int
    place: int


class Ground(NamedTuple):
    """What paths lead over: a model cut into stages, whose are held by each of the `replicas` of a fleet.

    Each batch of a replica goes in so many `microbatches`, activations coded by `codec`; draws depend on the `seed`.
    """

    cut: Cut
    replicas: tuple[int, ...]
    microbatches: int
    codec: Codec
    seed: int
    fleet: Fleet


class Paths(Kind):
    """Says which way microbatches go. Everybody draws the same ways, from the run file and its seed alone."""

    called = "kind of paths"
    built_in: ClassVar[dict[str, type[Paths]]] = {}

    crosses: ClassVar[bool] = False
    """Whether a microbatch may go through workers of other replicas: all replicas then do each step together."""
    mirrors: ClassVar[bool] = False
    """Whether stages take one another's places, and are cut alike for that."""

    def check(self, stages: int, microbatches: int, head: Literal["last", "first"]) -> None:
        """Raise `ConfigError` if there are no such ways through so many stages."""

    def check_cut(self, cut: Cut) -> None:
        """Raise `ConfigError` if there are no such ways through a model cut like that."""

    def draws(self, step: int) -> int:
        """Return what names the ways of local step `step`: steps with the same number go the same ways."""
        return 0

    @abstractmethod
    def ways(self, ground: Ground, draw: int) -> list[Path]:
        """Return the way of each microbatch of all replicas there."""

    def order(self, ground: Ground, draw: int) -> dict[int, list[Action]] | None:
        """Return what each worker does for `ways`, in turn; None: what the run file's order makes of them."""
        return None


def straight(cut: Cut, replicas: Sequence[int]) -> tuple[Hop, ...]:
    """Return the way through all blocks in their order, where stage s is that of replica `replicas[s]`."""
    grid = Grid(cut.stages)
    runs = sorted((run.start, run.stop, stage) for stage, held in enumerate(cut.held) for run in held)
    return tuple(Hop(grid.worker(replicas[stage], stage), start, stop) for start, stop, stage in runs)


class Straight(Paths):
    """Through the stages of the microbatch's own replica, one after the other."""

    name = "straight"

    def ways(self, ground: Ground, draw: int) -> list[Path]:
        stages = ground.cut.stages
        return [
            Path(replica, index, straight(ground.cut, [replica] * stages))
            for replica in ground.replicas
            for index in range(ground.microbatches)
        ]


class Swapped(Paths):
    """Every second microbatch goes through the first two stages and the last two the other way round.

        0, 1, 2, .., S - 3, S - 2, S - 1   and   1, 0, 2, .., S - 3, S - 1, S - 2

    So each of a pair learns to do the other's work, and can take its place if it is lost (CheckFree+, Blagoev et al.,
    arXiv 2506.15461). Embedding and head stay at the ends of the way. Of M microbatches floor(M / 2) are swapped.
    """

    name = "swapped"
    mirrors = True

    def check(self, stages: int, microbatches: int, head: Literal["last", "first"]) -> None:
        if stages < 4:
            raise ConfigError(f"pipeline.paths: 'swapped' swaps two pairs of stages, and there are {stages}; take 4")
        if microbatches < 2:
            raise ConfigError("pipeline.paths: 'swapped' swaps every second microbatch; take 2 microbatches at least")

    def check_cut(self, cut: Cut) -> None:
        cut.require_any_order()

    def ways(self, ground: Ground, draw: int) -> list[Path]:
        cut = ground.cut
        grid, stages = Grid(cut.stages), list(range(cut.stages))
        swapped = [1, 0, *stages[2:-2], stages[-1], stages[-2]]
        found = []
        for replica in ground.replicas:
            for index in range(ground.microbatches):
                order = swapped if index % 2 else stages
                runs = [(stage, cut.middle(stage)) for stage in order]
                for stage in (stages[0], stages[-1]):  # of whose blocks only the middles swap
                    for blocks in cut.outside(stage):
                        runs.insert(0 if blocks.start < cut.trunk.start else len(runs), (stage, blocks))
                found.append(Path(replica, index, _joined(grid, replica, runs)))
        return found


class Permuted(Paths):
    """Between two stages microbatches change replicas: for each, a random permutation of them says who goes where.

    From step to step and microbatch to microbatch another one, so replicas see each other's data and each worker as
    many microbatches as without (NoLoCo, Kolehmainen et al., arXiv 2506.10911). Each row clips by
    the norm of what has gone through it.
    """

    name = "permuted"
    crosses = True

    def draws(self, step: int) -> int:
        return step

    def ways(self, ground: Ground, draw: int) -> list[Path]:
        replicas, found = ground.replicas, []
        for index in range(ground.microbatches):
            columns = [list(replicas)]  # by stage: where the microbatch of each replica goes
            for stage in range(1, ground.cut.stages):
                chance = Random(seed_of(ground.seed, "paths", draw, index, stage))
                columns.append(chance.sample(replicas, len(replicas)))
            for place, replica in enumerate(replicas):
                found.append(Path(replica, index, straight(ground.cut, [column[place] for column in columns])))
        return found


def _joined(grid: Grid, replica: int, runs: Sequence[tuple[int, range]]) -> tuple[Hop, ...]:
    """Return the hops of a way through these blocks of the replica's stages; what one has on end is one hop."""
    hops: list[Hop] = []
    for stage, blocks in runs:
        worker = grid.worker(replica, stage)
        if hops and hops[-1].worker == worker and hops[-1].stop == blocks.start:
            hops[-1] = hops[-1]._replace(stop=blocks.stop)
        else:
            hops.append(Hop(worker, blocks.start, blocks.stop))
    return tuple(hops)
