"""What a trace says about preemptions in a few figures, and the model of preemption that fits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from decentral.errors import ConfigError
from decentral.fleet.churn import Churn, Preemption
from decentral.fleet.traces import Change
from decentral.fleet.units import HOUR_S


@dataclass(frozen=True, slots=True)
class Losses:
    """How machines were lost. A group is what is lost at one instant of the trace's clock."""

    rate_per_hour: float
    """Losses for each hour that a machine was there."""
    group_share: float
    """Share of the lost machines that went in groups of two or more."""
    group_mean: float
    """Machines lost at an instant at which any was."""
    largest_group: int
    lives_s: tuple[float, ...]
    """How long those machines that were lost had been there, ascending; empty where only counts are known."""
    vacancy_s: float
    """Mean seconds that a lost machine's place stayed empty: empty places over time / machines that came (Little's
    law), since there were first as many machines as there ever were."""


def losses_of(changes: Sequence[Change]) -> Losses:
    """Return the figures of a trace, up to its last change; raises `ConfigError` if it loses nothing."""
    groups = Counter(change.at_s for change in changes if not change.came)
    if not groups:
        raise ConfigError("the trace loses no machine; there is nothing to fit")
    full = max(_counts(changes))
    came_at: dict[str | None, float] = {}
    lives: list[float] = []
    machine_s = empty_s = 0.0
    came_back = there = 0
    was_full = False
    for change, after, before_s in zip(
        changes, _counts(changes), [0.0, *(each.at_s for each in changes)], strict=False
    ):
        machine_s += there * (change.at_s - before_s)
        if was_full:
            empty_s += (full - there) * (change.at_s - before_s)
            came_back += change.came
        if change.came:
            came_at[change.node] = change.at_s
        elif change.node is not None:
            lives.append(change.at_s - came_at.pop(change.node))
        there, before_s = after, change.at_s
        was_full = was_full or there == full
    lost = sum(groups.values())
    return Losses(
        rate_per_hour=lost / (machine_s / HOUR_S),
        group_share=sum(size for size in groups.values() if size > 1) / lost,
        group_mean=lost / len(groups),
        largest_group=max(groups.values()),
        lives_s=tuple(sorted(lives)),
        vacancy_s=empty_s / came_back if came_back else float("inf"),
    )


def fit(changes: Sequence[Change]) -> Preemption:
    """Return the model with a trace's rate, mean group and mean vacancy, which are its parameters' estimates.

    Rate and mean group are the maximum-likelihood estimates of an exponential life and of the geometric law.
    """
    losses = losses_of(changes)
    return Preemption(
        rate_per_hour=losses.rate_per_hour,
        group_mean=losses.group_mean,
        reacquire_s=losses.vacancy_s if losses.vacancy_s < float("inf") else None,
    )


def drawn(churn: Churn, machines: int, seed: int, horizon_s: float) -> list[Change]:
    """Return a trace that a model of churn draws for so many machines of one site."""
    sites = [None] * machines
    changes = [Change(0.0, True, str(worker)) for worker in sorted(churn.starters(sites))]
    for event in takewhile(lambda event: event.at_s <= horizon_s, churn.events(sites, seed)):
        at_s = event.at_s if event.kind == "join" else event.gone_at_s
        changes.append(Change(at_s, event.kind == "join", str(event.worker)))
    return sorted(changes, key=lambda change: change.at_s)


def _counts(changes: Sequence[Change]) -> list[int]:
    """Return how many machines there are after each change."""
    counts = []
    there = 0
    for change in changes:
        there += 1 if change.came else -1
        counts.append(there)
    return counts
