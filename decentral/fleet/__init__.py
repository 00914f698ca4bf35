"""The machines of a run, described."""

from decentral.fleet.churn import Churn, Exponential, Preemption, StageLosses
from decentral.fleet.events import Event
from decentral.fleet.fleet import Fleet
from decentral.fleet.groups import Slowing, Stalls, WorkerGroup
from decentral.fleet.links import FleetNetwork, Link
from decentral.fleet.partitions import Partition
from decentral.fleet.replay import Trace

__all__ = [
    "Churn",
    "Event",
    "Exponential",
    "Fleet",
    "FleetNetwork",
    "Link",
    "Partition",
    "Preemption",
    "Slowing",
    "StageLosses",
    "Stalls",
    "Trace",
    "WorkerGroup",
]
