"""An exchange of two workers whom nobody else meets meanwhile: all its times at once.

Each sends the other its contribution when its local phase has ended, and its verdict when it has trained and heard. On
the way from one to the other at most these two flows share, half each, and that happens one way at most: a verdict that
starts before its sender's contribution has left reaches the other before that can have a verdict of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Way(NamedTuple):
    """One way between two workers: what goes over it, when, and what the lines give."""

    begins_at: float
    """When the contribution is sent, in virtual seconds."""
    contribution_bits: float
    verdict_bits: float
    bps: float
    latency_s: float


class Meeting(NamedTuple):
    """Times of an exchange in virtual seconds. `one` has begun no later than `other`."""

    one_came: float
    """When one's contribution arrives."""
    one_heard: float
    """When one has the other's contribution, and sends its verdict."""
    one_told: float
    """When one's verdict arrives."""
    other_heard: float
    other_told: float

    @property
    def one_ended(self) -> float:
        """When one has the other's verdict, and has heard."""
        return max(self.one_heard, self.other_told)

    @property
    def other_ended(self) -> float:
        return max(self.other_heard, self.one_told)

    @property
    def over(self) -> float:
        """When nothing of the exchange is on its way any more."""
        return max(self.one_ended, self.other_ended)


def meet(one: Way, other: Way) -> Meeting:
    """Return when what happens in an exchange; `one` must not begin after `other`."""
    one_came = one.begins_at + one.contribution_bits / one.bps + one.latency_s
    other_came = other.begins_at + other.contribution_bits / other.bps + other.latency_s
    other_heard = max(other.begins_at, one_came)
    if other_heard < other_came:
        other_came, other_told = _send_both(other, other_heard)
        one_told = other_came + one.verdict_bits / one.bps + one.latency_s
    else:
        one_came, one_told = _send_both(one, other_came)
        other_heard = max(other.begins_at, one_came)
        other_told = other_heard + other.verdict_bits / other.bps + other.latency_s
    return Meeting(one_came, other_came, one_told, other_heard, other_told)


def _send_both(way: Way, verdict_at: float) -> tuple[float, float]:
    """Return when the contribution and the verdict arrive that go the same way; the latter starts at `verdict_at`."""
    begins_at, contribution_bits, verdict_bits, bps, latency_s = way
    ends_at = begins_at + contribution_bits / bps
    if verdict_at >= ends_at:
        return ends_at + latency_s, verdict_at + verdict_bits / bps + latency_s
    if verdict_at > begins_at:
        contribution_bits = max(0.0, contribution_bits - bps * (verdict_at - begins_at))
    half_bps = bps / 2
    ends_at = verdict_at + contribution_bits / half_bps
    verdict_ends_at = verdict_at + verdict_bits / half_bps
    if verdict_ends_at < ends_at:
        ends_at = verdict_ends_at + max(0.0, contribution_bits - half_bps * (verdict_ends_at - verdict_at)) / bps
    elif ends_at < verdict_ends_at:
        verdict_ends_at = ends_at + max(0.0, verdict_bits - half_bps * (ends_at - verdict_at)) / bps
    return ends_at + latency_s, verdict_ends_at + latency_s
