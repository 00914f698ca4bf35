"""What machines and their traffic cost. A price that nobody has given is unknown, not zero: accounts leave it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from decentral.fleet.partitions import require_site
from decentral.part import Section

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""US dollars; zero is a price."""

GB = 1e9
"""Bytes in a gigabyte as clouds bill traffic by it."""


class Prices(Section):
    """What traffic between sites costs; what machines cost stands in their groups."""

    egress_dollars_per_gb: Price | None = None
    """Dollars for each GB (10^9 bytes) that leaves a site for another one; unset: unknown."""
    egress: dict[str, Price] = Field(default_factory=dict)
    """The same for single sites, by the site that the bytes leave."""

    def egress_from(self, site: str | None) -> float | None:
        """Return dollars per GB that leaves this site for another one, None if nobody has given it."""
        return self.egress.get(site or "", self.egress_dollars_per_gb)

    def check(self, sites: Sequence[str | None]) -> None:
        """Raise `ConfigError` for the price of a site where no group is."""
        for site in self.egress:
            require_site(site, sites, f"fleet.prices.egress.{site}")
