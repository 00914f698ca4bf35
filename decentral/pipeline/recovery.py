"""How a stage is made anew that nobody holds any more, out of its neighbours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from decentral.errors import PeerGone
from decentral.naming import part_named
from decentral.part import Part
from decentral.pipeline.cut import Cut


class Neighbour(NamedTuple):
    """A stage that lives beside the lost one: its number, parameters `[P]`, and its last gradient's norm as applied."""

    stage: int
    params: Tensor
    norm: float


class Recovery(Part):
    """Says what a lost stage begins with. Its inner optimiser begins anew, with a learning rate `bump` times as high.

    The bump is of the run's own learning rate: losing a stage twice does not compound it, as in CheckFree's code.
    """

    bump: float = Field(default=1.1, gt=0)
    """Factor of the rebuilt stage's learning rate; 1: none."""

    def sources(self, stage: int, holders: Sequence[int]) -> tuple[int, ...]:
        """Return whose parameters, of those who hold theirs, rebuild `stage`. Raises `PeerGone` if nobody's."""
        found = tuple(other for other in (stage - 1, stage + 1) if other in holders)
        if not found:
            raise PeerGone(
                f"stage {stage} of its replica is lost and so are those beside it: nobody has parameters to rebuild it "
                "from; go on from a checkpoint"
            )
        return found

    def rebuilt(self, cut: Cut, stage: int, neighbours: Sequence[Neighbour]) -> Tensor:
        """Return the parameters `[P]` that the lost stage begins with. Raises `PeerGone` if there are none.

        Block by block, from those of the neighbours' blocks that have the same shapes and the like place.
        """
        whole = torch.empty(cut.layouts[stage].size)
        for place in cut.places(stage):
            alike = {}
            for index, neighbour in enumerate(neighbours):
                start = cut.counterpart(place.block, stage, neighbour.stage)
                if start is not None:
                    alike[index] = neighbour.params[start : start + place.stop - place.start]
            if not alike:
                raise PeerGone(
                    f"stage {stage} of its replica is lost, and no stage beside it has a block like block "
                    f"{place.block}; go on from a checkpoint"
                )
            weights = self.weights([neighbours[index] for index in alike])
            whole[place.start : place.stop] = sum(
                weight * values for weight, values in zip(weights, alike.values(), strict=True)
            )
        return whole

    @abstractmethod
    def weights(self, neighbours: Sequence[Neighbour]) -> list[float]:
        """Return how much each neighbour counts, in ascending order of stages; they add up to 1."""


class CheckFree(Recovery):
    """The mean of the neighbours, weighted by their gradients.

        W_i = (w_a W_{i-1} + w_b W_{i+1}) / (w_a + w_b),   w = |g|^exponent + epsilon

    Blagoev et al., arXiv 2506.15461, with the norm itself as in its code; its text may be read as the square (2). g is
    what the neighbour's last step applied, after clipping: whoever has the larger one has learned less so far, and
    hands more of its work over.
    """

    name = "checkfree"
    exponent: float = Field(default=1.0, ge=0)
    """Power of the gradient's norm by which a neighbour counts; 0: all alike."""
    epsilon: float = Field(default=1e-4, ge=0)
    """Added to both weights, so that there is a mean when neither has a gradient."""

    def weights(self, neighbours: Sequence[Neighbour]) -> list[float]:
        """Return w / (w_a + w_b); equal ones if both are 0."""
        shares = [neighbour.norm**self.exponent + self.epsilon for neighbour in neighbours]
        total = sum(shares)
        return [share / total for share in shares] if total else [1 / len(shares)] * len(shares)


class Copy(Recovery):
    """The parameters of the stage before; of the one behind, if that is lost too or there is none."""

    name = "copy"

    def weights(self, neighbours: Sequence[Neighbour]) -> list[float]:
        """Return 1 for the first neighbour."""
        return [1.0] + [0.0] * (len(neighbours) - 1)


RECOVERIES: dict[str, type[Recovery]] = {"checkfree": CheckFree, "copy": Copy}
"""The ways to rebuild a stage by the name that run files use."""
RecoveryField = Annotated[Recovery, BeforeValidator(lambda value: part_named(value, RECOVERIES, Recovery, "recovery"))]
