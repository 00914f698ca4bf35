"""What SkipPipe is compared with: the pipeline that leaves out nothing, and one whose paths know nothing of costs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from decentral.pipeline.skip.costs import Costs
from decentral.pipeline.skip.demands import Stages
from decentral.pipeline.skip.paths import search
from decentral.pipeline.skip.schedule import Schedule, microbatches_of, schedule_of
from decentral.replica import seed_of

NOISE = 1e-6
"""By how much equal links differ, so that a draw says which of many equal paths is taken."""


def full(stages: Stages, slots: int, costs: Costs, memory: int | None = None) -> Schedule:
    """Return the ordinary pipeline: every microbatch goes through all stages in ascending order.

    As many origins as a stage has nodes for keep to the nodes at their own place, where `place` puts those they are
    matched with; microbatches of the others take the stage's nodes by turns. With a `memory`, a node begins none while
    it holds so many: here more visit a node than where stages are skipped.
    """
    origins = stages[0]
    microbatches = microbatches_of(origins, slots)
    paths = []
    for origin, slot in microbatches:
        place = origins.index(origin)
        nodes = [_node(stage, place, len(origins), slot, slots) for stage in stages[1:]]
        paths.append((origin, *nodes))
    return schedule_of(microbatches, paths, costs, memory)


def random_skip(stages: Stages, slots: int, length: int, memory: int, costs: Costs, seed: int) -> Schedule:
    """Return the paths of a search to which all nodes and links are equal, the first with the loads right.

    The constraints are those of `search`, and so is what it raises. SkipPipe's code calls it "DT-FM skip".
    """
    chance = random.Random(seed_of(seed, "random skip"))
    ones = [1.0] * len(costs.forward)
    equal = Costs(ones, [[1 + chance.uniform(0, NOISE) for _ in ones] for _ in ones])
    blind = search(stages, slots, length, memory, equal, part_collisions=False)
    return schedule_of(blind.microbatches, blind.paths, costs)


def _node(stage: Sequence[int], place: int, origins: int, slot: int, slots: int) -> int:
    """Return the node of a stage that the origin at this place hands a microbatch to."""
    settled = origins - origins % len(stage)
    return stage[place % len(stage) if place < settled else ((place - settled) * slots + slot) % len(stage)]
