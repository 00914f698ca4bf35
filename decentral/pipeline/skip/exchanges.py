"""Better schedules by exchanging what two microbatches visit, as the replay judges it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from decentral.pipeline.skip.costs import Costs
from decentral.pipeline.skip.orders import orders_of
from decentral.pipeline.skip.replay import replay

Paths = tuple[tuple[int, ...], ...]


def exchanged(paths: Paths, stages: Sequence[Sequence[int]], costs: Costs, tries: int, chance: random.Random) -> Paths:
    """Return paths whose iteration is no longer, after so many tries of an exchange drawn at random.

    Two microbatches exchange a node each, or one changes its order. So every node is visited as often as before, and
    the orders stay within their limits. It goes on from what is as good, and returns what is better: an iteration that
    is shorter, or, if it is not, microbatches that are back earlier on the whole.
    """
    best, least = paths, _judged(paths, costs)
    for _ in range(tries):
        changed = _changed(paths, stages, chance)
        if changed is None:
            continue
        cost = _judged(changed, costs)
        if cost <= least:
            paths = changed
        if cost < least:
            best, least = changed, cost
    return best


def _judged(paths: Paths, costs: Costs) -> tuple[float, float]:
    replayed = replay(paths, costs)
    return replayed.makespan_s, sum(visits[-1].end_s for visits in replayed.visits)


def _changed(paths: Paths, stages: Sequence[Sequence[int]], chance: random.Random) -> Paths | None:
    """Draw an exchange; None if it is not allowed."""
    stage_of = {node: stage for stage, nodes in enumerate(stages) for node in nodes}
    one, other = chance.randrange(len(paths)), chance.randrange(len(paths))
    visited = {index: list(paths[index][1:]) for index in (one, other)}
    if one != other:
        here, there = (chance.randrange(len(nodes)) for nodes in visited.values())
        visited[one][here], visited[other][there] = visited[other][there], visited[one][here]
    changed = list(paths)
    for index, nodes in visited.items():
        at = {stage_of[node]: node for node in nodes}
        orders = orders_of(frozenset(at), len(stages))
        if len(at) < len(nodes) or not orders:
            return None
        changed[index] = (paths[index][0], *(at[stage] for stage in chance.choice(orders)))
    return tuple(changed) if changed != list(paths) else None
