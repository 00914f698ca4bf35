"""The machines of a run, described."""

from decentral.fleet.events import Event
from decentral.fleet.fleet import Fleet
from decentral.fleet.groups import WorkerGroup

__all__ = ["Event", "Fleet", "WorkerGroup"]
