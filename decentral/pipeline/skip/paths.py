"""Which microbatch takes which path: conflict-based search over the routes that each would take by itself.

The method is that of SkipPipe's code, in which microbatches are the agents of multi-agent path finding (Sharon et al.,
*Conflict-Based Search for Optimal Multi-Agent Path Finding*, 2015): everybody takes its fastest route, and while some
get into each other's way the search branches on who yields, and finds new routes for these. As there, first come loads
of stages (CC3), then of nodes (TC1), then collisions in time (TC2), and the event simulation chooses. Ours are:

- every microbatch is an agent, none stands for three;
- of the plans with equally many branchings behind them the best `width` are followed, instead of the best of all, so
  that the work is bounded and ends with plans that can be used;
- a plan is dropped as soon as what its microbatches still may do cannot meet the demands;
- the event simulation may also choose a plan with the loads right and collisions left: plans know nothing of backward
  passes that wait for one another, and about as often as not it is the better one;
- in the end microbatches exchange visits, as long as the replay finds that better.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from decentral.errors import ConfigError
from decentral.pipeline.skip.conflicts import Remedy, colliding, crowded
from decentral.pipeline.skip.costs import Costs
from decentral.pipeline.skip.demands import Demands, Stages
from decentral.pipeline.skip.exchanges import exchanged
from decentral.pipeline.skip.replay import replay
from decentral.pipeline.skip.routes import Limits, Route, Router
from decentral.pipeline.skip.schedule import Schedule, microbatches_of, schedule_of
from decentral.replica import seed_of

T = TypeVar("T")
YIELDS = 8
"""How often each microbatch may be told to yield in time, on the average, until the search gives up on a plan."""


class SearchEffort(NamedTuple):
    """How much work a search may be."""

    width: int = 16
    """Plans followed at once; as many are wanted with the loads right, and as many without collisions."""
    exchanges: int = 4000
    """Exchanges tried, a replay each."""


USUAL_EFFORT = SearchEffort()


class Plan(NamedTuple):
    """A node of the search's tree: what each microbatch may not do, and the fastest it can do then."""

    limits: tuple[Limits, ...]
    routes: tuple[Route, ...]

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        return tuple(route.path for route in self.routes)

    @property
    def cost(self) -> tuple[float, float]:
        """When the last microbatch is back, and the sum over all."""
        return max(route.end_s for route in self.routes), sum(route.end_s for route in self.routes)


def search(
    stages: Stages,
    slots: int,
    length: int,
    memory: int,
    costs: Costs,
    *,
    part_collisions: bool = True,
    seed: int = 0,
    effort: SearchEffort = USUAL_EFFORT,
) -> Schedule:
    """Return the best schedule found in which each node of stage 0 starts `slots` microbatches.

    `stages[s]` are the nodes of stage s, each of which may hold `memory` microbatches of an iteration; `length` the
    stages that each microbatch visits, the first included. Without `part_collisions` it is the first plan with the
    loads right (SkipPipe's "no TC2"). The same for the same seed, which is for the exchanges. Raises `ConfigError` if
    no schedule can meet the constraints, and says which of them, or if none was found.
    """
    demands = Demands(stages, slots, length, memory)
    planner = Planner(demands, slots, costs, effort)
    balanced = planner.grow([planner.root], planner.overloads)
    if not balanced:
        raise ConfigError(
            f"length: no paths through {length} of {len(stages)} stages were found that visit all stages equally often "
            "in the orders allowed (CC2, CC3); take another length, or a larger effort"
        )
    if not part_collisions:
        return schedule_of(planner.microbatches, balanced[0].paths, costs)
    parted = planner.grow(balanced, planner.conflicts)
    paths = min((plan.paths for plan in (*balanced, *parted)), key=lambda each: replay(each, costs).makespan_s)
    chance = random.Random(seed_of(seed, "exchanges"))
    return schedule_of(planner.microbatches, exchanged(paths, stages, costs, effort.exchanges, chance), costs)


class Planner:
    """Grows plans until nobody is in anybody's way."""

    def __init__(self, demands: Demands, slots: int, costs: Costs, effort: SearchEffort) -> None:
        self.microbatches = microbatches_of(demands.stages[0], slots)
        self._demands, self._effort = demands, effort
        self._router = Router(demands.stages, costs, demands.length)

    @property
    def root(self) -> Plan:
        """The plan in which everybody takes its fastest route."""
        free = Limits()
        routes = [self._router.route(microbatch, free) for microbatch in self.microbatches]
        assert all(routes)  # demands that can be met leave an order to everybody
        return Plan((free,) * len(routes), tuple(route for route in routes if route))

    def overloads(self, plan: Plan) -> list[Remedy]:
        """Return how to relieve the most overloaded stage, or else node."""
        by_stage = crowded(plan.routes, plan.limits, self._demands.by_stage)
        return by_stage or crowded(plan.routes, plan.limits, self._demands.by_node)

    def conflicts(self, plan: Plan) -> list[Remedy]:
        """Return how to relieve an overload, or else to part the first collision."""
        return self.overloads(plan) or colliding(plan.routes, plan.limits)

    def grow(self, plans: Sequence[Plan], find: Callable[[Plan], list[Remedy]]) -> list[Plan]:
        """Branch until so many plans as wanted are without conflicts, or none is left; return these, the best first.

        A plan can keep each microbatch away from each node once; yielding may go on for ever, and ends after `YIELDS`.
        """
        done: dict[tuple[tuple[int, ...], ...], Plan] = {}
        seen: set[tuple[Limits, ...]] = set()
        nodes = sum(map(len, self._demands.stages))
        for _ in range((nodes + YIELDS) * len(self.microbatches)):
            children: list[Plan] = []
            for plan in plans:
                remedies = find(plan)
                if not remedies:
                    done.setdefault(plan.paths, plan)
                for index, limits in remedies:
                    child = self._child(plan, index, limits)
                    if child is not None and child.limits not in seen:
                        seen.add(child.limits)
                        children.append(child)
            plans = self._best(children)
            if not plans or len(done) >= self._effort.width:
                break
        return sorted(done.values(), key=lambda plan: plan.cost)

    def _child(self, plan: Plan, index: int, limits: Limits) -> Plan | None:
        """Return the plan in which a microbatch has new limits, None if these leave it no route."""
        route = self._router.route(self.microbatches[index], limits)
        if route is None:
            return None
        return Plan(_with(plan.limits, index, limits), _with(plan.routes, index, route))

    def _best(self, plans: list[Plan]) -> list[Plan]:
        """Return the best plans of those that can still meet the demands."""
        best: list[Plan] = []
        for plan in sorted(plans, key=lambda plan: plan.cost):
            if len(best) < self._effort.width and self._demands.can_be_met(plan.limits):
                best.append(plan)
        return best


def _with(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
