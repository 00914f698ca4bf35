"""Microsoft Azure: what the metadata service says of events that are scheduled for this machine."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, BeforeValidator

from decentral.workers.notices.metadata import ANSWER_S, Absent, MetadataNotices, Unusable, ask, at_home, usable
from decentral.workers.notices.notice import Notice

NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
HEADERS = {"Metadata": "true"}
ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")
"""Types of events that a process does not survive; during a Freeze it only stands still for some seconds."""
SWITCH_ON_S = 120.0
"""Seconds that the first answer of all may take: asking is what switches scheduled events on."""


def _moment(text: object) -> object:
    """Return the datetime of an HTTP date such as "Mon, 19 Sep 2016 18:29:47 GMT"; None for "": it has begun."""
    return parsedate_to_datetime(text) if isinstance(text, str) and text else None


class _Event(BaseModel):
    EventId: str
    EventType: str
    Resources: list[str]
    NotBefore: Annotated[AwareDatetime | None, BeforeValidator(_moment)] = None


class _Document(BaseModel):
    Events: list[_Event]


class AzureNotices(MetadataNotices):
    """A spot machine will be evicted, 30 seconds ahead at least, or this machine will be deleted, rebooted or moved.

    `GET /metadata/scheduledevents?api-version=2020-07-01` with `Metadata: true` is `{"DocumentIncarnation": 1,
    "Events": [...]}`; an event has `EventId`, `EventType`, `Resources` (names of machines: those of the whole scale set
    come to everybody), `EventStatus` and `NotBefore`, empty once it has begun. `POST {"StartRequests": [{"EventId":
    ...}]}` to the same address lets it begin at once. Microsoft recommends to ask every second.
    https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events
    """

    name = "azure"
    every_s = 1.0

    _machine: str | None = None
    _answer_s = ANSWER_S + SWITCH_ON_S
    _event: str | None = None

    async def look(self) -> Notice | None:
        if self._machine is None:
            name = at_home(await ask(self._url + NAME_PATH, headers=HEADERS)).body.strip()
            if not re.fullmatch(r"[\w.-]+", name):  # what we took for our name would never be in a list
                raise Unusable(f"not a machine's name: {name[:40]!r}")
            self._machine = name.casefold()
        reply = usable(await ask(self._url + EVENTS_PATH, headers=HEADERS, answer_s=self._answer_s))
        document = _Document.model_validate_json(reply.body)
        self._answer_s = ANSWER_S
        for event in document.Events:
            if event.EventType in ENDS and self._machine in map(str.casefold, event.Resources):
                self._event = event.EventId
                left_s = 0.0 if event.NotBefore is None else reply.seconds_until(event.NotBefore)
                return Notice(self.name, left_s, f"Azure has scheduled for this machine: {event.EventType}")
        return None

    async def ready(self) -> None:
        """Acknowledge the event. It begins at once then, for every process on the machine.

        Tried once: an event that nobody acknowledges begins at its time.
        """
        if self._event is not None:
            body = json.dumps({"StartRequests": [{"EventId": self._event}]})
            with suppress(Absent, Unusable):
                await ask(self._url + EVENTS_PATH, method="POST", headers=HEADERS, body=body)
