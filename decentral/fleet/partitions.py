"""Partitions that heal: times in which some workers do not reach others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import Field, StrictInt, model_validator

from decentral.errors import ConfigError
from decentral.fleet.units import Seconds
from decentral.naming import nearest
from decentral.part import Section


def require_site(site: str, sites: Iterable[str | None], where: str) -> None:
    """Raise `ConfigError` unless a group is at this site."""
    known = sorted({each for each in sites if each is not None})
    if site not in known:
        raise ConfigError(
            f"{where}: no group is at '{site}'; {nearest(site, known)}sites: {', '.join(known) or 'none'}"
        )


class Partition(Section):
    """A time in which nothing passes between two sets of workers.

    Messages stall and go on when it heals, as TCP's do: it sends again for many minutes before it gives up. Whoever
    waits may lose patience (`patience_s`) before. Nobody leaves the run: votes and the list of members go another way.
    """

    from_s: Seconds
    """When it begins, in seconds after the start."""
    until_s: Seconds
    """When it heals, in seconds after the start."""
    side: tuple[StrictInt | str, ...] = Field(min_length=1)
    """Sites and numbers of workers."""
    other_side: tuple[StrictInt | str, ...] = ()
    """The same; empty: everybody else."""

    @model_validator(mode="after")
    def _heals_later(self) -> Partition:
        if self.until_s <= self.from_s:
            raise ValueError(f"until_s = {self.until_s:g} must be after from_s = {self.from_s:g}")
        return self

    def sides(self, sites: Sequence[str | None]) -> list[int]:
        """Return of each worker its side, 1 or 2, or 0 for none; `sites` are the workers'. Raises `ConfigError`."""
        one, other = self._members("side", sites), self._members("other_side", sites)
        if not self.other_side:
            other = set(range(len(sites))) - one
        for worker in sorted(one & other):
            raise ConfigError(f"other_side: worker {worker} is on both sides")
        if not other:
            raise ConfigError("side: all workers are on it, so that it parts nobody")
        return [1 if worker in one else 2 if worker in other else 0 for worker in range(len(sites))]

    def _members(self, field: str, sites: Sequence[str | None]) -> set[int]:
        members: set[int] = set()
        for place in getattr(self, field):
            if isinstance(place, int):
                if not 0 <= place < len(sites):
                    raise ConfigError(f"{field}: {place}, but workers are numbered 0 to {len(sites) - 1}")
                members.add(place)
            else:
                require_site(place, sites, field)
                members.update(worker for worker, site in enumerate(sites) if site == place)
        return members
