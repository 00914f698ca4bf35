"""What befalls workers, and when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from decentral.fleet.units import PositiveNumber, Seconds
from decentral.part import Section

Kind = Literal["crash", "preempt", "join", "slow", "link", "coordinator"]

_WHO = frozenset({"worker", "count", "site"})
_FIELDS: dict[Kind, tuple[frozenset[str], frozenset[str]]] = {  # of each kind: what it needs, what it may have
    "crash": (frozenset(), _WHO),
    "preempt": (frozenset(), _WHO | {"notice_s"}),
    "join": (frozenset(), _WHO),
    "slow": (frozenset({"factor"}), _WHO | {"until_s"}),
    "link": (frozenset({"factor"}), _WHO | {"until_s"}),
    "coordinator": (frozenset({"until_s"}), frozenset()),
}


class Event(Section):
    """Something that befalls workers of a simulated run: one by its number, a whole site, or some by chance.

    `{at_s = 600, kind = "crash", count = 3, site = "aws:us-east-1"}` crashes three workers of that site. The run's seed
    says which, among those who are there (for "join", among those who are not), whatever rule the run has.
    """

    at_s: Seconds
    """When, in seconds after the start."""
    kind: Kind = "crash"
    """"crash": gone in mid-sentence; the others find out `detection_s` later.
    "preempt": told at `at_s` that the machine will be taken away, gone `notice_s` later.
    "join": comes, or comes back.
    "slow": computes at `factor` times its speed.
    "link": its up- and downlink have `factor` times their capacity.
    "coordinator": nobody decides rounds until `until_s`."""
    worker: int | None = Field(default=None, ge=0)
    """The worker, by its number."""
    count: int | None = Field(default=None, ge=1)
    """So many workers, of those at `site` if that is given; all who are there if there are not so many."""
    site: str | None = None
    """The site of the workers; without `count`, all of them."""
    notice_s: Seconds | None = None
    """Seconds between the notice and the end: 120 on AWS, 30 on Google Cloud; unset: no notice."""
    factor: PositiveNumber | None = Field(default=None, le=1)
    """What is left of the speed or capacity, in (0, 1]."""
    until_s: Seconds | None = None
    """When it is over, in seconds after the start; unset: never."""

    @property
    def gone_at_s(self) -> float:
        """When the worker of a "crash" or "preempt" event is gone, in seconds after the start."""
        return self.at_s + (self.notice_s or 0.0)

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> Event:
        needed, allowed = _FIELDS[self.kind]
        given = {field for field in type(self).model_fields if getattr(self, field) is not None} - {"at_s", "kind"}
        for field in sorted(needed - given):
            raise ValueError(f'kind = "{self.kind}" needs {field}')
        for field in sorted(given - needed - allowed):
            known = ", ".join(["at_s", *sorted(needed | allowed)])
            raise ValueError(f'kind = "{self.kind}" has no {field}; its fields: {known}')
        if allowed >= _WHO and not given & _WHO:
            raise ValueError("whom? give worker = 3, or count = 3, or site, or count and site")
        if "worker" in given and given & {"count", "site"}:
            raise ValueError("worker names one worker; count and site name others: give one or the other")
        if self.until_s is not None and self.until_s <= self.at_s:
            raise ValueError(f"until_s = {self.until_s:g} must be after at_s = {self.at_s:g}")
        return self
