"""How a stage is made anew that nobody holds any more, out of its neighbours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor

from decentral.errors import PeerGone
from decentral.naming import Kind
from decentral.pipeline.cut import Cut


class Neighbour(NamedTuple):
    """A stage that lives beside the lost one: its number, parameters `[P]`, and its last gradient's norm as applied."""

    stage: int
    params: Tensor
    norm: float


class Follows(NamedTuple):
    """Stage `keeper` keeps a copy of these blocks of `stage`, and steps it as that one steps its own."""

    keeper: int
    stage: int
    blocks: tuple[int, ...]


class Recovery(Kind):
    """Says what a lost stage begins with. Its inner optimiser begins anew, unless copies of everything are kept."""

    called = "recovery"
    built_in: ClassVar[dict[str, type[Recovery]]] = {}

    mirrors: ClassVar[bool] = False
    """Whether it goes by stages that have learned to do one another's work, on the paths `Swapped`."""
    keeps_all: ClassVar[bool] = False
    """Whether copies are kept of everything, so that a stage begins where it was, its inner optimiser too."""

    bump: float = Field(default=1.0, gt=0)
    """Factor of the rebuilt stage's learning rate, 1: none. It is of the run's own: a second loss does not compound."""

    def follows(self, cut: Cut) -> list[Follows]:
        """Return of which blocks copies are kept, and where."""
        return []

    def sources(self, cut: Cut, stage: int, holders: Collection[int]) -> tuple[int, ...]:
        """Return whose parameters, of those who hold theirs, rebuild `stage`. Raises `PeerGone` if nobody's can."""
        return ()

    def rebuild(
        self, params: Tensor, cut: Cut, stage: int, neighbours: Sequence[Neighbour], copied: Collection[int]
    ) -> None:
        """Put into `params` `[P]`, which are as the run began with them, what the lost stage begins with.

        The neighbours are those of `sources`, in that order. Blocks that were `copied` are left alone.
        """


class Average(Recovery):
    """A mean of the stages beside the lost one, block by block: of those with the same shapes and the like place."""

    def sources(self, cut: Cut, stage: int, holders: Collection[int]) -> tuple[int, ...]:
        found = tuple(other for other in (stage - 1, stage + 1) if other in holders)
        if not found:
            raise PeerGone(
                f"stage {stage} of its replica is lost and so are those beside it: nobody has parameters to rebuild it "
                "from; go on from a checkpoint"
            )
        copied = {block for follows in self.follows(cut) if follows.stage == stage for block in follows.blocks}
        for place in cut.places(stage):
            if place.block not in copied and all(cut.counterpart(place.block, stage, other) is None for other in found):
                raise PeerGone(
                    f"stage {stage} of its replica is lost, and no stage beside it has a block like block "
                    f"{place.block}; go on from a checkpoint"
                )
        return found

    def rebuild(
        self, params: Tensor, cut: Cut, stage: int, neighbours: Sequence[Neighbour], copied: Collection[int]
    ) -> None:
        for place in cut.places(stage):
            if place.block in copied:
                continue
            starts = [cut.counterpart(place.block, stage, neighbour.stage) for neighbour in neighbours]
            alike = [
                (neighbour, neighbour.params[start : start + place.stop - place.start])
                for neighbour, start in zip(neighbours, starts, strict=True)
                if start is not None
            ]
            weights = self.weights([neighbour for neighbour, _ in alike])
            params[place.start : place.stop] = sum(
                weight * values for weight, (_, values) in zip(weights, alike, strict=True)
            )

    @abstractmethod
    def weights(self, neighbours: Sequence[Neighbour]) -> list[float]:
        """Return how much each neighbour counts, in ascending order of stages; they add up to 1."""


class CheckFree(Average):
    """The mean of the neighbours, weighted by their gradients.

        W_i = (w_a W_{i-1} + w_b W_{i+1}) / (w_a + w_b),   w = |g|^exponent + epsilon

    Blagoev et al., arXiv 2506.15461, with the norm itself as in its code; its text may be read as the square (2). g is
    what the neighbour's last step applied, after clipping: whoever has the larger one has learned less so far, and
    hands more of its work over.
    """

    name = "checkfree"
    bump: float = Field(default=1.1, gt=0)
    """As in CheckFree's code."""
    exponent: float = Field(default=1.0, ge=0)
    """Power of the gradient's norm by which a neighbour counts; 0: all alike."""
    epsilon: float = Field(default=1e-4, ge=0)
    """Added to both weights, so that there is a mean when neither has a gradient."""

    def weights(self, neighbours: Sequence[Neighbour]) -> list[float]:
        """Return w / (w_a + w_b); equal ones if both are 0."""
        shares = [neighbour.norm**self.exponent + self.epsilon for neighbour in neighbours]
        total = sum(shares)
        return [share / total for share in shares] if total else [1 / len(shares)] * len(shares)


class Copy(Average):
    """The parameters of the stage before; of the one behind, if that is lost too or there is none."""

    name = "copy"

    def weights(self, neighbours: Sequence[Neighbour]) -> list[float]:
        """Return 1 for the first neighbour."""
        return [1.0] + [0.0] * (len(neighbours) - 1)


class CheckFreePlus(CheckFree):
    """The first two stages, and the last two, take each other's parameters; others are rebuilt as by `CheckFree`.

    On the paths `swapped` they learn each other's work; either of a pair stands in for the other, as in the paper's
    code. The blocks outside of the trunk, embedding and head, have no like: the stage beside keeps a copy of them, to
    the bit (Blagoev et al., arXiv 2506.15461).
    """

    name = "checkfree_plus"
    mirrors = True

    def follows(self, cut: Cut) -> list[Follows]:
        beside = {0: 1, cut.stages - 1: cut.stages - 2}
        return [Follows(keeper, stage, tuple(cut.ends(stage))) for stage, keeper in beside.items() if cut.ends(stage)]

    def sources(self, cut: Cut, stage: int, holders: Collection[int]) -> tuple[int, ...]:
        last = cut.stages - 1
        mirror = {0: 1, 1: 0, last: last - 1, last - 1: last}.get(stage, stage)
        return (mirror,) if mirror in holders else super().sources(cut, stage, holders)


class Redundant(Recovery):
    """Every stage keeps a copy of the one behind it, the last of the first: a lost one goes on where it was.

    Each step it is sent that one's gradient and steps its copy as well: a stage's memory, and its traffic besides, for
    recoveries without loss, of parameters, of the inner optimiser and of what the rule keeps. After a round that
    changes these the copy is sent anew when the next phase begins: who is lost before that is as before the round.
    What Bamboo (Thorpe et al., NSDI 2023) keeps by computing the next stage's forward passes besides its own.
    """

    name = "redundant"
    keeps_all = True

    def follows(self, cut: Cut) -> list[Follows]:
        return [Follows((stage - 1) % cut.stages, stage, tuple(cut.of(stage))) for stage in range(cut.stages)]


class FromStart(Recovery):
    """The parameters with which the run began: all that the stage has learned is lost."""

    name = "from_start"


Recovery.built_in.update({kind.name: kind for kind in (CheckFree, CheckFreePlus, Copy, Redundant, FromStart)})
RECOVERIES = Recovery.built_in
"""The ways to rebuild a stage by the name that run files use."""
