"""Who comes late, and how long to wait for whom. No clock is read here: both worlds use it alike."""

from __future__ import annotations

from dataclasses import dataclass


class Lateness:
    """How long to wait for a worker's part in a round: the run's patience, or as long as it is known to need.

    Nothing is learned while all come in time. Who was waited for in vain and comes all the same has told how long it
    takes; from then on it is allowed `SLACK` times that, at most `MOST` patiences.

    So a slow worker is not skipped for ever. Let its phases take L seconds longer than ours. If its part in one round
    comes l seconds after we began to wait for it, and we waited only d < l, then in the next round

        l' = l + L - d > L,    and l = L in the first.

    So whatever is learned is L at least, and from then on d >= min(1.5 L, `MOST` patiences). If L is below `MOST`
    patiences, d > L: l falls by d - L a round until it is below d.

    Over a cut link nothing comes: whoever is waited for in vain twice, and nothing has come in between, is allowed no
    more than anybody else. A worker that is late on purpose costs `MOST` patiences a round.

    Nobody is allowed less than the patience, however punctual it has been. If it stalls, others who soon give up begin
    the next rounds without it, and it has to make up for each of these before all are in step again.
    """

    SLACK = 1.5
    """How much later than last time a worker may come: step times vary."""
    MOST = 10.0
    """Patiences that anybody is allowed at most: half of those that the real world waits for a decision."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._allowed: dict[tuple[int, str], float] = {}  # by worker and channel, in seconds
        self._overdue: dict[tuple[int, str], _Overdue] = {}

    def allowed_s(self, source: int, channel: str) -> float:
        """Return how many seconds to wait for what `source` brings to a round of the channel."""
        return self._allowed.get((source, channel), self._patience_s)

    def missed(self, source: int, channel: str, round_: int, since_s: float) -> None:
        """We have waited since then, in seconds of any clock, and given up. A round may be missed in several pieces."""
        overdue = self._overdue.get((source, channel))
        if overdue is None:
            self._overdue[source, channel] = _Overdue(round_, since_s, newest=round_)
        elif round_ > overdue.newest:
            if overdue.silent:
                self._allowed.pop((source, channel), None)
            overdue.newest, overdue.silent = round_, True

    def came(self, source: int, channel: str, round_: int, now_s: float) -> None:
        """Something of that round has come from `source`, late or not, by the same clock."""
        overdue = self._overdue.get((source, channel))
        if overdue is None:
            return
        overdue.silent = False
        if round_ < overdue.round:
            return
        del self._overdue[source, channel]
        if round_ == overdue.round:
            needs_s = max(self._patience_s, self.SLACK * (now_s - overdue.since_s))
            self._allowed[source, channel] = min(needs_s, self.MOST * self._patience_s)


@dataclass(slots=True)
class _Overdue:
    """A round for which somebody is still due, the newest such one, and whether it has been silent since that."""

    round: int
    since_s: float
    newest: int
    silent: bool = True
