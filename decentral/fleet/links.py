"""How workers are joined beyond their own lines: links between sites, partitions, and how flows share.

A run file says it in a few lines:

    [[fleet.workers]]
    count = 4
    site = "aws:us-east-1"      # known: bandwidth and latency to other regions as measured
    [[fleet.workers]]
    count = 2
    site = "lab"                # the user's own
    [[fleet.network.links]]
    source = "lab"
    to = "aws:us-east-1"
    bps = 1e9
    latency_s = 0.03
    [[fleet.network.links]]     # any two that are apart: what no other entry says
    loss = 0.0001

What joins two sites is looked up figure by figure: in the link between just these two, in the user's matrix, in what
the package knows (`decentral.fleet.sites`), in the link for any two; the fleet's latency and no cap if nothing says it.
Sites that none of the four joins are refused. Latencies of lines, as those of `home` have, come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field, model_validator

from decentral.errors import ConfigError
from decentral.fleet.matrix import Matrices
from decentral.fleet.partitions import Partition, require_site
from decentral.fleet.sites import LINES, Known, are_apart, has_latency, known, known_link, known_sites, line_of
from decentral.fleet.units import Seconds
from decentral.naming import nearest
from decentral.part import Section

Pair = tuple[str | None, str | None]
"""Source and destination; None: the groups without a site."""
Bandwidth = Annotated[float, Field(ge=1e3, le=1e14)]  # outside of it somebody has written Mbit/s, or bytes
Latency = Annotated[float, Field(ge=0, le=60)]  # above it somebody has written milliseconds


@dataclass(frozen=True, slots=True)
class Route:
    """What lies between the lines of two workers, every figure resolved."""

    bps: float = math.inf
    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    daily_dip: float = 0.0
    busiest_at_s: float = 0.0


class Link(Section):
    """What joins two sites, or any two that are apart if it names none; the other way too unless that has its own."""

    source: str | None = None
    """The site that sends; unset, like `to`: any."""
    to: str | None = None
    """The site that receives; the same site: what joins its own workers."""
    bps: Bandwidth | None = None
    """Bits per second that each pair of workers gets at most, beside the workers' own lines."""
    latency_s: Latency | None = None
    """Mean one-way latency in seconds."""
    jitter_s: Latency | None = None
    """Standard deviation of the latency in seconds, drawn log-normally for each message; late ones are overtaken."""
    loss: float | None = Field(default=None, ge=0, le=0.2)
    """Share of packets that are lost; what that costs stands in `decentral.sim.loss`."""
    daily_dip: float | None = Field(default=None, ge=0, lt=1)
    """Share of `bps` that others take at the busiest hour; it falls and rises as a cosine with a period of a day."""
    busiest_at_s: Seconds | None = None
    """When the busiest hour is, in seconds after the start."""

    @model_validator(mode="after")
    def _whole(self) -> Link:
        if (self.source is None) != (self.to is None):
            raise ValueError("source and to: give both, or neither for any two sites")
        if bool(self.daily_dip) != (self.busiest_at_s is not None):
            raise ValueError("daily_dip and busiest_at_s: the one says how deep, the other when; give both")
        return self


class FleetNetwork(Section):
    """What the network does beside the workers' own lines. Unset, it does nothing."""

    links: tuple[Link, ...] = ()
    """Simulated: what joins sites."""
    matrices: Matrices = Matrices()
    """Simulated: what joins sites, as CSV files."""
    overhead: float = Field(default=0.0, ge=0, lt=1)
    """Simulated: share of every bandwidth that headers take: 66 / 1514 = 0.0436 where a line's rate is that of Ethernet
    frames with IPv4 and TCP. 0 if bandwidths are those of payload, as `decentral profile` measures them."""
    local_latency_s: Latency = 0.0005
    """Simulated: one-way latency in seconds between two workers of one named site, unless something says otherwise."""
    partitions: tuple[Partition, ...] = ()
    """Simulated: times in which some workers do not reach others."""
    sharing: Literal["fair", "rtt_weighted"] = "fair"
    """Simulated: how flows divide what they share. "fair": all alike, max-min. "rtt_weighted": in proportion to one
    over their round-trip time, as TCP's congestion avoidance does."""
    window_bytes: int | None = Field(default=None, ge=1024)
    """Simulated: bytes of a message that may be on their way unacknowledged; it travels at no more than
    window / round-trip time. Unset: no limit."""

    def check(self, sites: Sequence[str | None], latency_s: float) -> None:
        """Raise `ConfigError` for names that nobody has and for sites that nothing joins.

        `sites` are those of the workers, in their order, `latency_s` the fleet's.
        """
        for site in dict.fromkeys(sites):
            if site is not None and site.partition(":")[0] in LINES and line_of(site) is None:
                kind, hint = site.partition(":")[0], nearest(site, known_sites())
                raise ConfigError(
                    f"fleet.workers: unknown site '{site}'; {hint}those of '{kind}' stand in decentral.fleet.sites"
                )
        named: set[Pair] = set()
        for index, link in enumerate(self.links):
            where = f"fleet.network.links.{index}"
            for field, site in (("source", link.source), ("to", link.to)):
                if site is not None and line_of(site) is None:
                    require_site(site, sites, f"{where}.{field}")
            if (link.source, link.to) in named:
                raise ConfigError(f"{where}: there is a link from {link.source or 'any'} to {link.to or 'any'} already")
            named.add((link.source, link.to))
        for index, partition in enumerate(self.partitions):
            try:
                partition.sides(sites)
            except ConfigError as error:
                raise ConfigError(f"fleet.network.partitions.{index}.{error}") from error
        self.routes(sites, latency_s)

    def routes(self, sites: Iterable[str | None], latency_s: float) -> dict[Pair, Route]:
        """Return what lies between any two of these sites, and inside of each; `latency_s` where nothing says it.

        Raises `ConfigError` if nothing joins two of them, and for figures that do not go together.
        """
        places = list(dict.fromkeys(sites))
        links = {(link.source, link.to): link for link in self.links}
        matrices = self.matrices.read()
        routes: dict[Pair, Route] = {}
        for one, other in [(one, other) for one in places for other in places]:
            sources = (  # the first that says a figure has the last word
                links.get((one, other)) or links.get((other, one)),
                known(*matrices, (one, other)),
                known_link(one, other),
                links.get((None, None)) if are_apart(one, other) else None,
            )
            routes[one, other] = self._route((one, other), [each for each in sources if each is not None], latency_s)
        return routes

    def _route(self, pair: Pair, sources: Sequence[Link | Known], latency_s: float) -> Route:
        if not sources and pair[0] != pair[1]:
            raise ConfigError(_not_joined(pair))
        figures = {field.name: _first(sources, field.name) for field in fields(Route)}
        if figures["latency_s"] is None:
            figures["latency_s"] = latency_s if are_apart(*pair) else self.local_latency_s
        route = Route(**{name: figure for name, figure in figures.items() if figure is not None})
        where = f"fleet.network.links: from {pair[0] or 'any'} to {pair[1] or 'any'}"
        if route.daily_dip and route.bps == math.inf:
            raise ConfigError(f"{where}: daily_dip is a share of bps, which nothing says; give bps too")
        if route.jitter_s and not route.latency_s and not any(has_latency(site) for site in pair):
            raise ConfigError(f"{where}: jitter_s needs a mean latency above 0; give latency_s too")
        return route


def _first(sources: Iterable[Link | Known], field: str) -> float | None:
    """Return the figure of the first that says it."""
    figures = (getattr(source, field, None) for source in sources)
    return next((figure for figure in figures if figure is not None), None)


def _not_joined(pair: Pair) -> str:
    one, other = (f"'{site}'" if site is not None else "the groups without a site" for site in pair)
    unknown = [site for site in pair if site is not None and line_of(site) is None]
    hints = [nearest(site, known_sites()) for site in unknown]
    return (
        f"fleet.network: no link between {one} and {other}; {''.join(hints)}give a [[fleet.network.links]] with source "
        "and to, or one without them for any two sites"
    )
