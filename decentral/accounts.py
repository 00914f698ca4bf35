"""What a run used and what that cost: each worker's time, samples, bytes, dollars and energy; each link's traffic.

A machine is *rented* from the moment it joins until it leaves, by its own will or not: a crash ends its bill. A worker
that crashed is *down* until it joins again or the run ends. The samples of a stay are *useful* up to the last settled
round that counted the worker among its members; those of a stay that lasted to the end all are. *Possible* samples are
those it would have trained on at its own measured pace, had it computed all the time for which it was rented; goodput
is useful samples by possible ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from decentral.fleet import Fleet, WorkerGroup
from decentral.fleet.prices import GB, Prices
from decentral.fleet.units import HOUR_S
from decentral.journal import Joined, Left, Record, Synced, Trained
from decentral.traffic import Traffic

SETTLED = ("committed", "degraded")
STOPPED = "stopped"
TO_THE_END = ("finished", STOPPED)
"""Why workers leave that are not lost: they have done their steps, or the run has been stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAccount:
    """One worker's part in a run. Seconds are the run's own, virtual in the simulator; None: nobody knows."""

    worker: int
    site: str | None
    rented_s: float
    compute_s: float
    """Computing and evaluating."""
    talk_s: float
    """A packet of its own on the way, and nothing to compute."""
    idle_s: float
    """Waiting for others."""
    down_s: float
    samples: int
    useful_samples: int
    possible_samples: float | None
    """None for a worker that has trained on nothing: its pace is unknown."""
    sent_bytes: int
    received_bytes: int
    dollars: float | None
    """The machine alone."""
    egress_dollars: float | None
    joules: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAccount:
    """What went one way across a link. `peak_bps` is the most at any instant, None where nobody has watched."""

    kind: Literal["up", "down", "pair", "sites"]
    """A worker's uplink or downlink, from worker to worker, or from one site to another."""
    source: int | str | None
    target: int | str | None
    nbytes: int
    capacity_bps: float | None = None
    """As the run began; None: unknown, or no limit of its own."""
    utilisation: float | None = None
    """Bits carried, by those that the capacity would have carried in the time for which the worker was rented."""
    peak_bps: float | None = None


@dataclass(frozen=True, slots=True)
class Accounts:
    """All accounts of a run, workers and links in ascending order."""

    seconds: float
    workers: tuple[WorkerAccount, ...]
    links: tuple[LinkAccount, ...]

    @property
    def goodput(self) -> float | None:
        """Useful samples by possible ones, over the workers whose pace is known; None if there is none."""
        known = [(each.useful_samples, each.possible_samples) for each in self.workers if each.possible_samples]
        return sum(useful for useful, _ in known) / sum(possible or 0.0 for _, possible in known) if known else None

    @property
    def dollars(self) -> float | None:
        """What all machines cost together; None unless every worker's price is known."""
        return _total([worker.dollars for worker in self.workers])

    @property
    def egress_dollars(self) -> float | None:
        """What traffic between sites cost; None unless every price is known."""
        return _total([worker.egress_dollars for worker in self.workers])

    @property
    def joules(self) -> float | None:
        """Energy of all machines; None unless every worker's power is known."""
        return _total([worker.joules for worker in self.workers])

    def to_fields(self) -> dict[str, Any]:
        """Return the accounts as JSON-able fields, totals first."""
        return {
            "seconds": self.seconds,
            "goodput": self.goodput,
            "dollars": self.dollars,
            "egress_dollars": self.egress_dollars,
            "joules": self.joules,
            "workers": [dataclasses.asdict(worker) for worker in self.workers],
            "links": [dataclasses.asdict(link) for link in self.links],
        }


def accounts_of(fleet: Fleet, records: Iterable[Record], seconds: float, traffic: Traffic) -> Accounts:
    """Return the accounts of a run that has ended: its whole journal, its length and what its network carried.

    The journal is gone through once, and again if somebody has not stayed to the end.
    """
    lives = _lives(records)
    useful = _useful_samples(records, lives)
    groups = fleet.each()
    workers = tuple(
        _worker_account(lives[worker], groups[worker], fleet.prices, useful, seconds, traffic)
        for worker in sorted(lives)
    )
    links = [*_worker_links(workers, traffic), *_site_links(groups, traffic), *_pair_links(traffic)]
    return Accounts(seconds, workers, tuple(links))


@dataclass(slots=True)
class _Life:
    """What the journal says of one worker, over all its stays in the run."""

    worker: int
    joined: list[float] = dataclasses.field(default_factory=list)
    left: list[Left] = dataclasses.field(default_factory=list)
    samples: int = 0
    timed_samples: int = 0
    timed_s: float = 0.0

    @property
    def pace(self) -> float | None:
        """Samples a second of computing, None if unknown.

        By the phases that say how long they took, so that one which a crash cut short does not count. Single gradients
        do not say; of these less than one is lost.
        """
        if self.timed_samples:
            return self.timed_samples / self.timed_s
        compute_s = self.spent("compute")
        return self.samples / compute_s if self.samples and compute_s else None

    @property
    def finished(self) -> bool:
        return bool(self.left) and self.left[-1].reason in TO_THE_END

    def spent(self, *kinds: str) -> float:
        return sum(left.seconds.get(kind, 0.0) for left in self.left for kind in kinds)


def _lives(records: Iterable[Record]) -> dict[int, _Life]:
    lives: dict[int, _Life] = {}
    for record in records:
        if isinstance(record, Trained):
            life = lives[record.worker]
            life.samples += record.samples
            if record.seconds:
                life.timed_samples += record.samples
                life.timed_s += record.seconds
        elif isinstance(record, Joined):
            lives.setdefault(record.worker, _Life(record.worker)).joined.append(record.time_s)
        elif isinstance(record, Left):
            lives[record.worker].left.append(record)
    return lives


def _useful_samples(records: Iterable[Record], lives: dict[int, _Life]) -> dict[int, int]:
    """Return each worker's samples less those that a stay which did not last to the end had in no settled round."""
    if all(left.reason in TO_THE_END for life in lives.values() for left in life.left):
        return {life.worker: life.samples for life in lives.values()}
    unsettled: Counter[int] = Counter()
    useful = dict.fromkeys(lives, 0)
    seen: set[tuple[str, int, tuple[int, ...]]] = set()
    for record in records:
        if isinstance(record, Trained):
            unsettled[record.worker] += record.samples
        elif isinstance(record, Left):
            left = unsettled.pop(record.worker, 0)
            useful[record.worker] += left if record.reason in TO_THE_END else 0
        elif isinstance(record, Synced) and record.outcome in SETTLED:
            key = (record.channel, record.round, record.members)
            if key not in seen:  # every member tells of the round
                seen.add(key)
                for worker in record.members:
                    useful[worker] += unsettled.pop(worker, 0)
    return useful


def _worker_account(
    life: _Life, group: WorkerGroup, prices: Prices, useful: dict[int, int], seconds: float, traffic: Traffic
) -> WorkerAccount:
    ends = [left.time_s for left in life.left]
    rented_s = math.fsum(ends) - math.fsum(life.joined)
    away_s = math.fsum(life.joined[1:]) - math.fsum(ends[:-1])
    compute_s, talk_s, idle_s = life.spent("compute", "evaluate"), life.spent("talk"), life.spent("wait")
    joules = None if group.power is None else group.power * compute_s + (group.idle_watts or 0.0) * (talk_s + idle_s)
    abroad = sum(traffic.to_sites.get(life.worker, {}).values())
    pace = life.pace
    egress = prices.egress_from(group.site)
    return WorkerAccount(
        worker=life.worker,
        site=group.site,
        rented_s=rented_s,
        compute_s=compute_s,
        talk_s=talk_s,
        idle_s=idle_s,
        down_s=away_s if life.finished else away_s + seconds - ends[-1],
        samples=life.samples,
        useful_samples=useful[life.worker],
        possible_samples=None if pace is None else pace * rented_s,
        sent_bytes=sum(left.sent_bytes for left in life.left),
        received_bytes=sum(left.received_bytes for left in life.left),
        dollars=None if group.price is None else group.price * rented_s / HOUR_S,
        egress_dollars=None if egress is None else egress * abroad / GB,
        joules=joules,
    )


def _worker_links(workers: Iterable[WorkerAccount], traffic: Traffic) -> Iterator[LinkAccount]:
    for account in workers:
        worker = account.worker
        sides: tuple[tuple[Literal["up", "down"], list[float], list[int], list[float]], ...] = (
            ("up", traffic.up_bps, traffic.up_bytes, traffic.up_peak_bps),
            ("down", traffic.down_bps, traffic.down_bytes, traffic.down_peak_bps),
        )
        for kind, capacity_bps, nbytes, peak_bps in sides:
            could_carry = capacity_bps[worker] * account.rented_s
            yield LinkAccount(
                kind=kind,
                source=worker if kind == "up" else None,
                target=worker if kind == "down" else None,
                nbytes=nbytes[worker],
                capacity_bps=capacity_bps[worker],
                utilisation=8 * nbytes[worker] / could_carry if could_carry else None,
                peak_bps=peak_bps[worker] if traffic.watched else None,
            )


def _site_links(groups: Sequence[WorkerGroup], traffic: Traffic) -> Iterator[LinkAccount]:
    carried: Counter[tuple[str | None, str | None]] = Counter()
    for worker, to_sites in traffic.to_sites.items():
        carried.update({(groups[worker].site, site): nbytes for site, nbytes in to_sites.items()})
    for (source, target), nbytes in sorted(carried.items(), key=lambda item: [site or "" for site in item[0]]):
        peak_bps = traffic.site_peak_bps.get((source, target))
        yield LinkAccount(kind="sites", source=source, target=target, nbytes=nbytes, peak_bps=peak_bps)


def _pair_links(traffic: Traffic) -> Iterator[LinkAccount]:
    for (source, target), tally in sorted(traffic.pairs.items()):
        yield LinkAccount(kind="pair", source=source, target=target, nbytes=tally.received)


def _total(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if parts and len(known) == len(parts) else None
