"""How often nodes and stages are to be visited (SkipPipe's CC3 and TC1), and whether that can be done at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations

from decentral.errors import ConfigError
from decentral.pipeline.skip.flow import largest_flow
from decentral.pipeline.skip.orders import JUMP, START, SWAPS, Progress
from decentral.pipeline.skip.routes import Limits

Stages = Sequence[Sequence[int]]
Group = tuple[int, ...]


class Demands:
    """What an iteration asks of a pipeline: `slots` microbatches of each node of stage 0, each at `length` stages.

    All stages but the first are visited equally often, or, where the visits cannot be shared out equally, none more
    often than the quotient rounded up (CC3). A node has at most `memory` microbatches of an iteration (TC1). Raises
    `ConfigError` if the pipeline is none, or cannot do that.
    """

    def __init__(self, stages: Stages, slots: int, length: int, memory: int) -> None:
        _require_sane(stages, slots, length, memory)
        self.stages, self.length, self.memory = stages, length, memory
        self.microbatches = slots * len(stages[0])
        self.visits = self.microbatches * (length - 1)
        most = -(-self.visits // (len(stages) - 1))
        self._is_exact = most * (len(stages) - 1) == self.visits
        self.by_stage: Mapping[Group, int] = {tuple(nodes): min(most, len(nodes) * memory) for nodes in stages[1:]}
        self.by_node: Mapping[Group, int] = {(node,): memory for nodes in stages[1:] for node in nodes}
        self._require_memory(slots, most)
        self._require_order(most)

    def can_be_met(self, limits: Sequence[Limits]) -> bool:
        """Say whether everybody can visit enough stages beside the nodes that it may not visit, in whatever order."""
        capacity: dict[object, dict[object, int]] = {"source": {}}
        for index, each in enumerate(limits):
            capacity["source"][index] = self.length - 1
            capacity[index] = {(index, stage): 1 for stage in range(1, len(self.stages))}
            for stage, nodes in enumerate(self.stages[1:], start=1):
                capacity[index, stage] = {("node", node): 1 for node in nodes if node not in each.banned}
        for stage, (nodes, most) in enumerate(self.by_stage.items(), start=1):
            capacity["stage", stage] = {"sink": most}
            for node in nodes:
                capacity["node", node] = {("stage", stage): self.memory}
        return largest_flow(capacity, "source", "sink") == self.visits

    def _require_memory(self, slots: int, most: int) -> None:
        if slots > self.memory:
            raise ConfigError(
                f"slots: each node of stage 0 starts {slots} microbatches and has memory for "
                f"{self.memory} (TC1); take at most {self.memory}"
            )
        for stage, nodes in enumerate(self.stages[1:], start=1):
            if self._is_exact and len(nodes) * self.memory < most:
                raise ConfigError(
                    f"memory: stage {stage} has {len(nodes)} nodes for {self.memory} microbatches each, and all stages "
                    f"are to be visited equally often, {most} times (TC1, CC3); give it more nodes or more memory"
                )
        if not self.can_be_met([Limits()] * self.microbatches):
            raise ConfigError(
                f"memory: {self.microbatches} microbatches are to visit {self.length - 1} stages each beside the "
                f"first, and the nodes have memory for {sum(self.by_stage.values())} such visits, none twice by the "
                "same (TC1, CC3); take more memory, fewer slots or a smaller length"
            )

    def _require_order(self, most: int) -> None:
        """Compare what the orders allow with what is asked of every run of stages."""
        for first, stop in combinations(range(1, len(self.stages) + 1), 2):
            counts = list(_visits_within(START, self.length - 1, len(self.stages), first, stop))
            asked = most * (stop - first)
            if min(counts) * self.microbatches > asked or (self._is_exact and max(counts) * self.microbatches < asked):
                raise ConfigError(
                    f"length: whoever visits {self.length} of {len(self.stages)} stages, at most {JUMP} ahead and "
                    f"{SWAPS} times one back, is at {min(counts)} to {max(counts)} of stages {first} to {stop - 1}, "
                    "and all stages are to be visited equally often (CC2, CC3); take a larger length"
                )


def _require_sane(stages: Stages, slots: int, length: int, memory: int) -> None:
    nodes = [node for each in stages for node in each]
    if len(stages) < 2 or not all(stages) or len(set(nodes)) != len(nodes):
        raise ConfigError(f"stages: {[list(each) for each in stages]}; take two or more, each with nodes of its own")
    if not 2 <= length <= len(stages):
        raise ConfigError(f"length: {length} is not allowed; a microbatch visits 2 to {len(stages)} stages (CC1)")
    if slots < 1 or memory < 1:
        raise ConfigError(f"slots, memory: {slots} and {memory}; take 1 or more of each")


@cache
def _visits_within(progress: Progress, left: int, stages: int, first: int, stop: int) -> frozenset[int]:
    """Return how many of `left` more stages can be among `first .. stop - 1`; empty if no order has so many more."""
    if left == 0:
        return frozenset({0})
    return frozenset(
        (first <= stage < stop) + count
        for stage, then in progress.ahead(stages)
        for count in _visits_within(then, left - 1, stages, first, stop)
    )
