"""Sites whose lines and links are known: cloud regions as measured, the networks of papers, and lines at home.

- `aws:us-east-1`, `azure:eastus`, `gcp:us-central1-a`, ...: 60 regions with what two machines in them get by Skyplane's
  measurements (`data/README-skyplane.md`); latency is half the round trip, lines are the network cards of its machines.
- `halos:0` to `halos:3`: the four regions of HALoS (*Hierarchical Asynchronous Local SGD over Slow Networks for
  Geo-Distributed LLM Training*, ICML 2025, arXiv 2506.04531). Its simulator has no latencies: the fleet's holds.
- `low:a`, `medium:a`, `high:a` with any name for a: data centres of one kind, joined by 10, 100 or 400 Gbit/s with 10,
  1 or 0.1 ms, and "high" inside (Charles et al., *Communication-Efficient Language Model Training Scales Reliably and
  Robustly: Scaling Laws for DiLoCo*, 2025, arXiv 2503.09799).
- `home`, `wan`, `mobile`, `poor`: machines with an internet line each, drawn for each from a range. They are apart
  from each other too, and the latency between two of them is the sum of both. The ranges are assumptions; that of
  `home` lies around the 100 Mbit/s down and 20 Mbit/s up that the FCC has called broadband since 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from decentral.fleet.matrix import Matrix, parse_matrix

Range = tuple[float, float]
"""From the least to the most, drawn log-uniformly; equal: no draw."""


@dataclass(frozen=True, slots=True)
class Line:
    """How a machine of a site is joined to the world, where its group does not say."""

    up_bps: Range
    down_bps: Range
    access_s: Range = (0.0, 0.0)
    """One-way latency between the machine and where the internet begins."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the link between two machines; None: nothing."""

    bps: float | None = None
    latency_s: float | None = None


INTERNET_LINES = {  # ranges of 1 MByte/s = 8e6 bit/s
    "home": Line((10e6, 40e6), (50e6, 200e6), (0.005, 0.02)),
    "wan": Line((80e6, 800e6), (80e6, 800e6), (0.005, 0.025)),
    "mobile": Line((8e6, 80e6), (8e6, 80e6), (0.025, 0.1)),
    "poor": Line((0.8e6, 8e6), (0.8e6, 8e6), (0.1, 0.5)),
}
"""Two machines of one kind are 10 to 40, 10 to 50, 50 to 200 and 200 to 1,000 ms apart."""

LINES = {  # of the clouds those of m5.8xlarge, D32_v5 and n2-standard-32, with which Skyplane measured
    "aws": Line((10e9, 10e9), (10e9, 10e9)),
    "azure": Line((16e9, 16e9), (16e9, 16e9)),
    "gcp": Line((32e9, 32e9), (32e9, 32e9)),
    "halos": Line((100e9, 100e9), (100e9, 100e9)),
    "low": Line((400e9, 400e9), (400e9, 400e9)),
    "medium": Line((400e9, 400e9), (400e9, 400e9)),
    "high": Line((400e9, 400e9), (400e9, 400e9)),
}
"""By what stands before the colon."""

HALOS_GBPS = """region,halos:0,halos:1,halos:2,halos:3
halos:0,100,0.537,0.935,0.202
halos:1,0.537,100,0.386,0.117
halos:2,0.935,0.386,100,0.127
halos:3,0.202,0.117,0.127,100
"""

DATA_CENTRES = {"low": Known(10e9, 1e-2), "medium": Known(100e9, 1e-3), "high": Known(400e9, 1e-4)}


def line_of(site: str | None) -> Line | None:
    """Return the line of a machine at this site, None if the package does not know the site."""
    if site is None or site in INTERNET_LINES:
        return INTERNET_LINES.get(site or "")
    kind, _, rest = site.partition(":")
    is_known = bool(rest) if kind in DATA_CENTRES else site in _named()
    return LINES.get(kind) if is_known else None


def known_link(source: str | None, to: str | None) -> Known | None:
    """Return what is known of the link between machines of two sites, or of one; None if nothing is."""
    if source is None or to is None:
        return None
    if source in INTERNET_LINES and to in INTERNET_LINES:
        return Known(latency_s=0.0)  # theirs is in the lines
    kind = source.partition(":")[0]
    if kind in DATA_CENTRES and kind == to.partition(":")[0]:
        return DATA_CENTRES["high" if source == to else kind]
    return known(_bandwidths(), _latencies(), (source, to))


def known(bps: Matrix, latency_s: Matrix, pair: tuple[str | None, str | None]) -> Known | None:
    """Return what two matrices know of a pair of sites; None if they have neither figure."""
    one, other = pair
    if one is None or other is None:
        return None
    found = Known(bps.get((one, other)), latency_s.get((one, other)))
    return None if found == Known() else found


def has_latency(site: str | None) -> bool:
    """Say whether the lines of a site's machines have a latency of their own."""
    line = line_of(site)
    return line is not None and line.access_s[1] > 0.0


def are_apart(source: str | None, to: str | None) -> bool:
    """Say whether machines of these two sites are joined by a link rather than by the network inside of a site."""
    return source != to or source is None or source in INTERNET_LINES


def known_sites() -> list[str]:
    """Return the names of the sites that the package knows, one for each kind of data centre."""
    return [*INTERNET_LINES, *(f"{kind}:a" for kind in DATA_CENTRES), *sorted(_named())]


@cache
def _bandwidths() -> Matrix:
    """Return bit/s between the machines of two sites."""
    matrix = _read("skyplane_gbps_2022-01.csv") | parse_matrix(HALOS_GBPS, "HALoS")
    return {pair: gbps * 1e9 for pair, gbps in matrix.items()}


@cache
def _latencies() -> Matrix:
    """Return seconds, one way, between two cloud regions."""
    return {pair: rtt_ms / 2e3 for pair, rtt_ms in _read("skyplane_rtt_ms_2022-04.csv").items()}


def _read(name: str) -> Matrix:
    return parse_matrix((resources.files("decentral.fleet") / "data" / name).read_text(encoding="utf-8"), name)


@cache
def _named() -> frozenset[str]:
    """Return the sites of the matrices."""
    return frozenset(source for source, _ in _bandwidths())
