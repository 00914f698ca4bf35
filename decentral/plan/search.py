"""The search: crew by crew, those first that would be best if machines did nothing but compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.plan.bounds import bound
from decentral.plan.candidates import runs_of
from decentral.plan.churn import forecast_with_churn
from decentral.plan.crews import crews
from decentral.plan.forecast import Forecast
from decentral.plan.wanted import Option, Wanted
from decentral.plan.work import Work
from decentral.protocols import DDP, StreamingDiLoCo, SyncRule

Answer = Forecast | ConfigError
"""What a run will come to, or why it cannot be."""
NO_RULE = "plan: no rule that is tried can train on this fleet; name one that can as the run file's rule"

Attempt = Callable[[Sequence[Run], Work], Iterable[Answer]]
"""Forecasts runs, in their order."""


def attempted(run: Run, work: Work) -> Answer:
    """Return the forecast of a run, or the error that it would end with."""
    try:
        return forecast_with_churn(run, work)
    except ConfigError as error:
        return error


def one_by_one(runs: Sequence[Run], work: Work) -> Iterable[Answer]:
    """Forecast runs in this process."""
    return (attempted(run, work) for run in runs)


def search(
    work: Work,
    wanted: Wanted,
    attempt: Attempt = one_by_one,
    *,
    rules: Sequence[SyncRule] | None = None,
    least_crews: int = 0,
) -> list[Option]:
    """Return the options that were simulated; no other one could be much better than the best of them.

    A crew takes at least as long as its slowest machine computes, so crews whose bound is worse than what has been
    found are passed over, but for the first `least_crews`. Streaming, of which every message is simulated, is tried
    there, and where others leave something to be gained: the longest phases first, shorter ones while these are as
    good. `rules` are tried in place of `rules_of`. Raises `ConfigError` if no run can be.
    """
    found = _Found(work, wanted, attempt)
    by_crew = [list(runs_of(work, crew, rules)) for crew in crews(work)]
    bounds = [(_least(runs, work), runs) for runs in by_crew if runs]
    if not bounds:
        raise ConfigError(next(iter(work.unfit.values()), NO_RULE))
    able = [(least, runs) for least, runs in bounds if wanted.keeps(least.seconds, least.dollars)]
    if not able:
        raise ConfigError(wanted.out_of_reach([least for least, _ in bounds]))
    for tried, (least, runs) in enumerate(sorted(able, key=lambda each: wanted.value(each[0]))):
        thorough = tried < least_crews
        if not thorough and found.no_gain(least):
            break
        plain = [each for each in runs if isinstance(each[1].rule, DDP)]
        streaming = [each for each in runs if isinstance(each[1].rule, StreamingDiLoCo)]
        found.add([each for each in runs if not isinstance(each[1].rule, DDP | StreamingDiLoCo)])
        found.add([each for each in plain if thorough or not found.no_gain(bound(each[1], work))])
        if not thorough and found.near(least):
            continue
        for each in reversed(streaming):
            if not found.add([each]):
                break
    return found.all()


class _Found:
    """What has been simulated so far."""

    def __init__(self, work: Work, wanted: Wanted, attempt: Attempt) -> None:
        self._work, self._wanted, self._attempt = work, wanted, attempt
        self._options: list[Option] = []
        self._refused: list[ConfigError] = []

    def add(self, runs: Sequence[tuple[int, Run]]) -> bool:
        """Forecast runs, each with its place; say whether one of them is about as good as the best of all."""
        answers = self._attempt([run for _, run in runs], self._work)
        good = False
        for (place, run), answer in zip(runs, answers, strict=True):
            if isinstance(answer, ConfigError):
                self._refused.append(answer)
            else:
                self._options.append(Option(run, answer, place))
                good = good or not self.no_gain(answer)
        return good

    def no_gain(self, least: Forecast) -> bool:
        """Say whether the best so far is better than what takes this much."""
        return self._wanted.value(least) > (1 + self._wanted.slack) * self._best()

    def near(self, least: Forecast) -> bool:
        """Say whether the best so far is about as good as this."""
        return self._best() <= (1 + self._wanted.slack) * self._wanted.value(least)

    def all(self) -> list[Option]:
        """Return all options. Raises the first error if there are none."""
        if not self._options:
            raise self._refused[0]
        return self._options

    def _best(self) -> float:
        return min((self._wanted.value(each.forecast) for each in self._wanted.kept(self._options)), default=math.inf)


def _least(runs: Sequence[tuple[int, Run]], work: Work) -> Forecast:
    """Return what a crew takes at least under any of the rules."""
    return min((bound(run, work) for _, run in runs), key=lambda least: least.seconds)
