"""Large models, simulated small: what travels and what carries it are made smaller alike, so that all takes as long."""

from __future__ import annotations

from typing import Any

from decentral.config import Run
from decentral.fleet import Fleet
from decentral.plan.work import Work
from decentral.protocols import Buckets

SIZE = 1 << 22
"""Parameters of the largest model that is simulated as it is: its vectors go in two segments, a large one's in 64."""


def shrunk(run: Run, work: Work) -> tuple[Run, float]:
    """Return a run that takes as long, and the share of its bytes that travels there; the run itself if it is small.

    In place of its model there is a stack of as many equal layers. Where what a connection carries has terms of its own
    (loss, a window), nothing is changed: these are in bytes or packets.
    """
    share = SIZE / work.parameters
    network = run.fleet.network
    if share >= 1 or network.window_bytes or any(link.loss for link in network.links):
        return run, 1.0
    task = {"name": "layer_stack", "layers": work.layers, "parameters": share * work.parameters}
    rule = run.rule
    cuts: dict[str, Any] = {
        field: cut.model_copy(update={"megabytes": share * cut.megabytes})
        for field, cut in ((field, getattr(rule, field)) for field in type(rule).model_fields)
        if isinstance(cut, Buckets)
    }
    rule = rule.model_copy(update=cuts)
    fleet = _with_coding(with_bandwidth(run.fleet, share), share)
    return run.model_copy(update={"task": task, "rule": rule, "fleet": fleet}), share


def with_bandwidth(fleet: Fleet, factor: float) -> Fleet:
    """Return the fleet with so many times the bandwidth of every line and link, whatever says it.

    What headers take (`fleet.network.overhead`) is the one figure that all bandwidths have in common. Of faster lines
    it is below zero, which no run file may say: such a fleet is for simulating alone.
    """
    overhead = 1 - factor * (1 - fleet.network.overhead)
    return fleet.model_copy(update={"network": fleet.network.model_copy(update={"overhead": overhead})})


def _with_coding(fleet: Fleet, factor: float) -> Fleet:
    """Return the fleet with machines that code so many times as many bits a second."""
    groups = [
        group.model_copy(update={"coding_bps": group.coding_bps and factor * group.coding_bps})
        for group in fleet.workers
    ]
    coding_bps = fleet.coding_bps and factor * fleet.coding_bps
    return fleet.model_copy(update={"workers": tuple(groups), "coding_bps": coding_bps})
