"""What a plan is to be good at, and what it must keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet.units import HOUR_S
from decentral.plan.forecast import Forecast
from decentral.report.summary import dollars_text

Goal = Literal["time", "cost"]
GOALS: tuple[Goal, ...] = get_args(Goal)

SLACK = 0.005
"""Plans that are nearer to each other than this share are alike: predictions order rules no more finely."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to do the work."""

    run: Run
    forecast: Forecast
    place: int
    """Among those that are tried with this crew: how far it is from data-parallel training."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Least time, or least cost, within limits; None: no such limit.

    What takes, or costs, up to `slack` (a share) more than the best counts as equally good.
    """

    goal: Goal = "time"
    hours: float | None = None
    dollars: float | None = None
    slack: float = SLACK

    def check(self, priced: bool) -> None:
        """Raise `ConfigError` for limits that nothing can keep, and where prices are needed that nobody has given."""
        for name, limit in (("--hours", self.hours), ("--dollars", self.dollars)):
            if limit is not None and not 0 < limit < math.inf:
                raise ConfigError(f"{name} {limit:g}: give a number above 0")
        if not 0 <= self.slack < math.inf:
            raise ConfigError(f"--slack {self.slack:g}: give a share, such as 0.05 for 5 %, or 0")
        if (self.goal == "cost" or self.dollars is not None) and not priced:
            asked = "--for cost" if self.goal == "cost" else "--dollars"
            raise ConfigError(
                f"{asked}: nobody says what the machines cost; give each group dollars_per_hour, or device and billing"
            )

    def value(self, forecast: Forecast) -> float:
        """Return what is to be small: seconds, or dollars."""
        return forecast.seconds if self.goal == "time" else forecast.dollars or 0.0

    def keeps(self, seconds: float, dollars: float | None) -> bool:
        """Say whether the limits are kept."""
        return seconds <= HOUR_S * _limit(self.hours) and (dollars or 0.0) <= _limit(self.dollars)

    def kept(self, options: Sequence[Option]) -> list[Option]:
        """Return the options that keep the limits, the best first."""
        kept = [each for each in options if self.keeps(each.forecast.seconds, each.forecast.dollars)]
        return sorted(kept, key=lambda option: self.value(option.forecast))

    def choice(self, options: Sequence[Option]) -> Option:
        """Return the first choice: of those as good as the best, the one nearest to data-parallel training.

        Of equals in this the one with fewer workers. Raises `ConfigError` if no option keeps the limits.
        """
        kept = self.kept(options)
        if not kept:
            raise ConfigError(self.out_of_reach([option.forecast for option in options]))
        most = (1 + self.slack) * self.value(kept[0].forecast)
        good = [option for option in kept if self.value(option.forecast) <= most]
        return min(good, key=lambda option: (option.place, option.run.fleet.size))

    def out_of_reach(self, forecasts: Sequence[Forecast]) -> str:
        """Return that nothing keeps the limits, and what the least would be."""
        limits = [("--hours", self.hours), ("--dollars", self.dollars)]
        asked = " ".join(f"{name} {limit:g}" for name, limit in limits if limit is not None)
        quickest = min(each.seconds for each in forecasts) / HOUR_S
        costs = [each.dollars for each in forecasts if each.dollars is not None]
        least = f", and the cheapest way costs {dollars_text(min(costs))} or more" if costs else ""
        return f"plan: nothing keeps {asked}: the quickest way takes {quickest:.3g} hours or more{least}"


def _limit(limit: float | None) -> float:
    return math.inf if limit is None else limit
