"""Whether nodes reach one another, how quickly, and how much goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from decentral.config import Run
from decentral.doctor import sizes
from decentral.doctor.finding import Finding
from decentral.doctor.visits import Visit
from decentral.errors import TaskError
from decentral.pipeline.memory import FLOAT32_BYTES

NAME = "links"
FAR_S = 0.5
"""One-way latency above which every exchange of a round is felt."""
LONG_S = 600.0
"""A model that takes longer than that to be sent once is not for this link without a codec."""
SHARE = 0.5
"""Less than such a share of the bandwidth that the run file says is told."""


def judge(visits: Sequence[Visit], run: Run) -> Iterator[Finding]:
    """Yield what is to be said of visits: of those that answered well, where bandwidth was measured."""
    try:
        bits = 8 * FLOAT32_BYTES * sizes.parameters(run)
    except TaskError:  # the check of memory says it
        bits = 0
    for visit in visits:
        where = f"{visit.source} to {visit.target}"
        if visit.error:
            yield Finding(
                NAME,
                "problem",
                f"{where}: {visit.error}",
                "open the ports of docs/security.md between the nodes, and give all of them the same secret and "
                "certificates",
            )
            continue
        told = f"{where}: {1e3 * visit.latency_s:.3g} ms one way"
        if visit.bps is not None:
            told += f", {visit.bps / 1e6:.3g} Mbit/s"
        finding = _judged(told, visit, bits, run)
        if visit.bps is not None or finding.level != "ok":
            yield finding


def _judged(told: str, visit: Visit, bits: int, run: Run) -> Finding:
    said = run.fleet.up_bps if "up_bps" in run.fleet.model_fields_set else None
    if visit.latency_s > FAR_S:
        return Finding(NAME, "warning", told, "choose a long period, and a rule that trains while it talks")
    if visit.bps is not None and said is not None and visit.bps < SHARE * said:
        told += f", where the run file's fleet has {said / 1e6:.3g}"
        return Finding(
            NAME, "warning", told, "let `decentral profile` measure fleet.up_bps, or simulations are too quick"
        )
    if visit.bps is not None and bits > LONG_S * visit.bps:
        told += f": the model's parameters take {bits / visit.bps:.0f} s"
        return Finding(NAME, "warning", told, "choose a codec and a long period")
    return Finding(NAME, "ok", told)
