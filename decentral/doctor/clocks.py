"""Whether the nodes' clocks agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from decentral.doctor.finding import Finding
from decentral.doctor.visits import Visit

NAME = "clocks"
NOTABLE_S, TOO_MUCH_S = 0.5, 30.0
"""Journals of several nodes are hard to put together when their clocks differ by as much as rounds last. Who comes back
on another node counts its lives by that one's clock: if it is far behind, the run takes it for an older life."""


def judge(visits: Sequence[Visit]) -> Iterator[Finding]:
    """Yield what is to be said of clocks; of those that agree, by how much at most they may differ."""
    answered = [visit for visit in visits if not visit.error]
    agree = True
    for visit in {frozenset((visit.source, visit.target)): visit for visit in answered}.values():  # a pair once
        least_s = abs(visit.ahead_s) - visit.latency_s
        if least_s < NOTABLE_S:
            continue
        agree = False
        side = "ahead of" if visit.ahead_s > 0 else "behind"
        yield Finding(
            NAME,
            "problem" if least_s > TOO_MUCH_S else "warning",
            f"{visit.target} is {abs(visit.ahead_s):.3f} s {side} {visit.source}, give or take {visit.latency_s:.3f} s",
            "have a time service (chrony, systemd-timesyncd) set the clocks of both",
        )
    if answered and agree:
        apart_s = max(abs(visit.ahead_s) + visit.latency_s for visit in answered)
        yield Finding(NAME, "ok", f"no two are more than {apart_s:.3f} s apart")
