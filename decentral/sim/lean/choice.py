"""Which runs can be timed without messages, and how."""

from __future__ import annotations

from typing import Any

from decentral.config import Run
from decentral.fleet import Fleet
from decentral.protocols.rule import SyncRule
from decentral.sim.lean.agenda import Agenda
from decentral.sim.lean.exchanges import time_exchanges
from decentral.sim.lean.reductions import time_reductions
from decentral.sim.lean.timed import Timed, Unforeseen
from decentral.sim.links import Links
from decentral.state import Layout

CONSTANT = {"up_bps", "down_bps", "latency_s", "pair_bps"}
"""What a network is told whose capacities do not change, and whose flows have no terms of their own."""


def timed(run: Run, fleet: Fleet, layout: Layout) -> Timed | None:
    """Return what a run without tensors comes to on a fleet whose step times are known; None if it takes messages."""
    if run.leases or run.pipeline.stages > 1 or fleet.events or fleet.brings_newcomers:
        return None
    agenda = Agenda()
    links = Links(fleet, run.seed, agenda.time)
    if not links.options().keys() <= CONSTANT:
        return None
    exchanges, reductions = _said(run.rule, "exchanges"), _said(run.rule, "reductions")
    try:
        if exchanges is not None:
            return time_exchanges(run, fleet, layout.size, exchanges, agenda, links)
        if reductions is not None and not _takes_time_to_code(fleet):
            return time_reductions(run, fleet, layout, reductions, agenda, links)
    except Unforeseen:
        pass
    return None


def _takes_time_to_code(fleet: Fleet) -> bool:
    """Say whether all-reduces have to wait for coding; exchanges never code aside."""
    return any(group.coding_bps or fleet.coding_bps for group in fleet.workers)


def _said(rule: SyncRule, what: str) -> Any:
    """Return what the rule says that its rounds are, if it says so beside its `run`."""
    cls = next(cls for cls in type(rule).__mro__ if "run" in vars(cls))
    return getattr(rule, what)() if what in vars(cls) else None
