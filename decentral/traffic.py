"""What a network carried, as who watched it has counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class PairBytes:
    """Bytes of whole messages from one worker to another: handed in, arrived, and lost with a worker that crashed."""

    sent: int = 0
    received: int = 0
    lost: int = 0


@dataclass(slots=True)
class Traffic:
    """Traffic of one run, by worker. What was not watched is empty.

    `up_bps[worker]` and `down_bps[worker]` are the lines as the run began, in bits per second; `up_bytes[worker]` and
    `down_bytes[worker]` count messages whose last byte left, or arrived, over them. `to_sites[worker]` has the bytes
    that the worker handed in for workers at other sites, by their site. The rest is there for watched runs alone:
    `pairs[source, target]`, and the most that the uplink and the downlink of each worker and the traffic from one site
    to another one carried at any instant, in bits per second.
    """

    up_bps: list[float]
    down_bps: list[float]
    up_bytes: list[int]
    down_bytes: list[int]
    to_sites: dict[int, dict[str | None, int]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], PairBytes] = field(default_factory=dict)
    up_peak_bps: list[float] = field(default_factory=list)
    down_peak_bps: list[float] = field(default_factory=list)
    site_peak_bps: dict[tuple[str | None, str | None], float] = field(default_factory=dict)

    @property
    def watched(self) -> bool:
        """Whether `pairs` and the peaks were kept."""
        return bool(self.up_peak_bps)
