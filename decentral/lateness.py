"""Who comes late, and how long to wait for whom. No clock is read here: both worlds use it alike."""

from __future__ import annotations

from dataclasses import dataclass


class Lateness:
    """How long to wait for a worker's part in a round: for as long as the run's patience, or as it is known to need.

    Nothing is learned while everybody comes in time. When somebody has been waited for in vain and comes all the same,
    what it would have needed is known, and it is allowed `SLACK` times as long from then on, `MOST` patiences at most.

    So whoever is slow is not skipped for ever. Let its phases take L seconds longer than ours. Of a round that we do
    not wait for, its lag is left over: the next one comes l' = l + L - d seconds after we began to wait for it, if the
    one before came after l and we waited for d < l. Hence l' > L. What we learn is above L, so that d >= 1.5 L, and the
    lag shrinks by at least L / 2 a round until it comes in time, provided that L is below `MOST` patiences.

    A link that is cut between the living looks like a slow worker: what was on its way comes when it heals. Who is
    waited for in vain twice, and nothing has come in between, is allowed no more than anybody else. A worker that is
    late on purpose costs `MOST` patiences a round at most.

    Deadlines are never below the patience, however regular the rounds have been: who gives up early on a worker that
    has stalled runs away from it, and each of the rounds that it gave up is lost to both.
    """

    SLACK = 1.5
    """Latenesses that a worker is allowed: step times vary."""
    MOST = 10.0
    """Patiences that anybody is allowed: half of what the worlds give a decision, for which all must have come."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._allowed: dict[tuple[int, str], float] = {}  # by worker and channel, in seconds
        self._overdue: dict[tuple[int, str], _Overdue] = {}

    def allowed_s(self, source: int, channel: str) -> float:
        """Return how many seconds to wait for what `source` sends in a round on the channel."""
        return self._allowed.get((source, channel), self._patience_s)

    def missed(self, source: int, channel: str, round_: int, since_s: float) -> None:
        """What `source` should have sent for a round has been waited for in vain since then."""
        overdue = self._overdue.get((source, channel))
        if overdue is None:
            self._overdue[source, channel] = _Overdue(round_, since_s, round_)
        elif round_ > overdue.newest:
            if not overdue.heard:
                self._allowed.pop((source, channel), None)
            overdue.newest, overdue.heard = round_, False

    def came(self, source: int, channel: str, round_: int, now_s: float) -> None:
        """Something that `source` sent for a round has come, waited for or not."""
        overdue = self._overdue.get((source, channel))
        if overdue is None:
            return
        overdue.heard = True
        if round_ < overdue.round:
            return
        del self._overdue[source, channel]
        if round_ == overdue.round:
            needed_s = self.SLACK * (now_s - overdue.since_s)
            most_s = self.MOST * self._patience_s
            self._allowed[source, channel] = min(max(self._patience_s, needed_s), most_s)


@dataclass(slots=True)
class _Overdue:
    """Somebody's parts that have been waited for in vain: of the first such round, of which it will be learned, since when;
    which is the newest; and whether anything has been heard since that one."""

    round: int
    since_s: float
    newest: int
    heard: bool = False
