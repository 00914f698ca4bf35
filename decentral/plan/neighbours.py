"""What would change the answer: the same question for fleets like this one, and where between them the answer turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from decentral.errors import ConfigError
from decentral.fleet import Fleet, Link
from decentral.plan.candidates import rules_of
from decentral.plan.search import search
from decentral.plan.shrink import with_bandwidth
from decentral.plan.wanted import Option, Wanted
from decentral.plan.work import Work
from decentral.protocols import SyncRule

Axis = Literal["bandwidth", "latency", "step time"]
AXES: tuple[Axis, ...] = get_args(Axis)
FAR = 4.0
"""How many times as much, and as little, there is of it."""
HALVINGS = 4
"""Times that the interval in which the answer turns is halved, on a logarithmic scale: from 4 times to 9 % of it."""


@dataclass(frozen=True, slots=True)
class Change:
    """The first choice where there is `factor` times as much of something, all else being equal."""

    axis: Axis
    factor: float
    option: Option
    turns: bool
    """Whether the answer turns about here: up to here rule and number of workers are those of the first choice."""


def changes(
    work: Work, wanted: Wanted, first: Option, rules: Sequence[SyncRule] | None, way: tuple[Axis, bool]
) -> list[Change]:
    """Return the first choice with four times as much of something, or a fourth, and where on the way it turns.

    `way` says of what, and whether there is more of it. Empty if there is no plan there, as where nothing keeps the
    limits.
    """
    axis, more = way
    option = _asked(work, wanted, rules, axis, FAR if more else 1 / FAR)
    if option is None:
        return []
    far = Change(axis, FAR if more else 1 / FAR, option, False)
    if _kind(option) == _kind(first):
        return [far]
    tried = rules_of(work.run, work.run.fleet.size) if rules is None else rules
    two = [rule for rule in tried if rule.spelling() in (_kind(option)[0], _kind(first)[0])]
    return [_turn(lambda factor: _asked(work, wanted, two, axis, factor), first, far), far]


def varied(work: Work, axis: Axis, factor: float) -> Work:
    """Return the work on a fleet with so many times the bandwidth, the latency or the time of a local step."""
    fleet = work.run.fleet
    if axis == "bandwidth":
        fleet = with_bandwidth(fleet, factor)
    elif axis == "latency":
        fleet = _with_latency(fleet, factor)
    else:
        groups = [
            group.model_copy(update={"step_time_s": factor * (group.step_time_s or fleet.step_time_s)})
            for group in fleet.workers
        ]
        fleet = fleet.model_copy(update={"workers": tuple(groups)})
    return replace(work, run=work.run.model_copy(update={"fleet": fleet}))


def _with_latency(fleet: Fleet, factor: float) -> Fleet:
    """Return the fleet with so many times the latency between any two workers, but for that of lines at home."""
    sites = [site for site in dict.fromkeys(fleet.sites()) if site is not None]
    routes = fleet.network.routes(sites, fleet.latency_s)
    links = [
        Link.model_construct(
            source=source,
            to=to,
            bps=route.bps,
            latency_s=factor * route.latency_s,
            jitter_s=route.jitter_s,
            loss=route.loss,
        )
        for (source, to), route in routes.items()
    ]
    links += [
        link.model_copy(update={"latency_s": link.latency_s and factor * link.latency_s})
        for link in fleet.network.links
        if link.source is None
    ]
    network = fleet.network.model_copy(update={"links": tuple(links)})
    return fleet.model_copy(update={"network": network, "latency_s": factor * fleet.latency_s})


def _asked(work: Work, wanted: Wanted, rules: Sequence[SyncRule] | None, axis: Axis, factor: float) -> Option | None:
    try:
        return wanted.choice(search(varied(work, axis, factor), wanted, rules=rules))
    except ConfigError:
        return None


def _turn(ask: Callable[[float], Option | None], first: Option, far: Change) -> Change:
    """Return about where the answer turns between the fleet as it is, where it is `first`, and another."""
    near = 1.0
    for _ in range(HALVINGS):
        middle = (near * far.factor) ** 0.5
        option = ask(middle)
        if option is None or _kind(option) == _kind(first):
            near = middle
        else:
            far = Change(far.axis, middle, option, True)
    return replace(far, turns=True)


def _kind(option: Option) -> tuple[str, int]:
    return option.run.rule.spelling(), option.run.fleet.size
