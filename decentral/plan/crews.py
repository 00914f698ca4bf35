"""How many workers, and which: parts of a fleet that may do better than all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from decentral.fleet import Fleet, WorkerGroup
from decentral.fleet.sites import line_of
from decentral.plan.work import Work, step_s

MOST_KINDS = 8
"""Groups of a fleet up to which a crew may end with any of them; of more, sizes alone are tried."""


def crews(work: Work) -> list[Fleet]:
    """Return the fleet and parts of it, each once.

    Workers are put in order, and as many of the first as are a power of two, or end a group, are a crew. There are four
    orders: the fastest first; the widest line first; the fastest site first, so that others are asked only when it has
    nobody left; and the cheapest work first, where prices are known.
    """
    fleet, seconds = work.run.fleet, step_s(work)
    groups = [group for group, each in enumerate(fleet.workers) for _ in range(each.count)]
    speed_of_site: dict[str | None, float] = {}
    for group in groups:
        site = fleet.workers[group].site
        speed_of_site[site] = speed_of_site.get(site, 0.0) + 1 / seconds[group]

    def by_site(group: int) -> tuple[float, str, float]:
        site = fleet.workers[group].site
        return -speed_of_site[site], site or "", seconds[group]

    def by_line(group: int) -> tuple[float, float]:
        each = fleet.workers[group]
        return -min(each.up_bps or fleet.up_bps, each.down_bps or fleet.down_bps), seconds[group]

    orders = [sorted(groups, key=key) for key in (seconds.__getitem__, by_line, by_site)]
    prices = [group.price for group in fleet.workers]
    known = [price for price in prices if price is not None]
    if len(known) == len(prices):
        orders.append(sorted(groups, key=lambda group: (known[group] * seconds[group], seconds[group])))
    counts = dict.fromkeys(
        tuple(order[:size].count(group) for group in range(len(fleet.workers)))
        for order in orders
        for size in _sizes(order, len(fleet.workers) <= MOST_KINDS)
    )
    return [part_of(fleet, each) for each in counts]


def part_of(fleet: Fleet, counts: Sequence[int]) -> Fleet:
    """Return the fleet with so many workers of each group, and of its network and prices what concerns them."""
    if list(counts) == [group.count for group in fleet.workers]:
        return fleet
    groups = tuple(
        group.model_copy(update={"count": count}) for group, count in zip(fleet.workers, counts, strict=True) if count
    )
    sites = {group.site for group in groups}
    links = tuple(link for link in fleet.network.links if _there(link.source, sites) and _there(link.to, sites))
    network = fleet.network.model_copy(update={"links": links})
    egress = {site: price for site, price in fleet.prices.egress.items() if site in sites}
    prices = fleet.prices.model_copy(update={"egress": egress})
    return fleet.model_copy(update={"workers": groups, "network": network, "prices": prices})


def told(groups: Iterable[WorkerGroup]) -> str:
    """Return a crew for people: how many, and of which kinds if it has kinds."""
    kinds: Counter[str] = Counter()
    for group in groups:
        kinds[" at ".join(each for each in (group.device, group.site) if each)] += group.count
    total = sum(kinds.values())
    if len(kinds) < 2:
        return str(total)
    return f"{total}: " + ", ".join(f"{count} {kind or 'other'}" for kind, count in kinds.items())


def _sizes(order: Sequence[int], ends: bool) -> list[int]:
    whole = len(order)
    sizes = {whole, *(2**power for power in range(whole.bit_length()) if 2**power <= whole)}
    if ends:
        sizes |= {place for place in range(1, whole) if order[place] != order[place - 1]}
    return sorted(sizes)


def _there(site: str | None, sites: set[str | None]) -> bool:
    return site is None or site in sites or line_of(site) is not None
