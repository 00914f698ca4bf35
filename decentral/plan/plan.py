"""`plan`: which rule, settings and workers for a fleet and an amount of work, and what would change the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group

from decentral.config import Run, validated, write_run
from decentral.errors import ConfigError
from decentral.fleet.units import HOUR_S
from decentral.plan.candidates import rules_of
from decentral.plan.forecast import patience_s
from decentral.plan.laws import loss_above_data_parallel
from decentral.plan.memory import unfit
from decentral.plan.neighbours import AXES, Change, changes
from decentral.plan.pool import spread
from decentral.plan.search import Answer, attempted, search
from decentral.plan.table import plan_tables, settings_text
from decentral.plan.wanted import Option, Wanted
from decentral.plan.work import Work, dollars_per_s
from decentral.protocols import DiLoCo, SyncRule

VERSION = 1
"""Of the JSON document; it changes when a field changes its meaning or goes."""
COMPARED = 3
"""Crews that are always tried, so that the answer says what others would take."""

Tell = Callable[[int, int], None]
"""Is told how many forecasts are made, and how many have been asked for so far."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer: the first choice, the others that were simulated, and what would change it."""

    work: Work
    wanted: Wanted
    first: Option
    options: Sequence[Option]
    """All that keep the limits, the best first."""
    changes: Sequence[Change]

    @property
    def run(self) -> Run:
        """The first choice as a run that trains and simulates.

        Its workers wait for others as long as its rounds may take. Where machines come and go it has more local steps,
        for not all of them are done by all.
        """
        run, forecast = self.first.run, self.first.forecast
        changes = {
            "patience_s": patience_s(run, forecast.round_s),
            "steps": math.ceil(forecast.stretch * run.steps),
        }
        return validated(run.model_copy(update=changes).to_table(), "plan")

    @property
    def runners_up(self) -> list[Option]:
        """The best option under each other rule, and with each other number of workers, the best first."""
        rules, sizes = {self.first.run.rule.spelling()}, {self.first.run.fleet.size}
        found = []
        for option in self.options:
            rule, size = option.run.rule.spelling(), option.run.fleet.size
            if rule not in rules or size not in sizes:
                found.append(option)
                rules.add(rule)
                sizes.add(size)
        return found

    def loss(self, option: Option) -> float | None:
        """Return by what share the option's loss is above data parallelism's, where that is published."""
        if not isinstance(option.run.rule, DiLoCo) or self.work.run.make_task().tokens_per_sample is None:
            return None
        return loss_above_data_parallel(self.work.parameters, option.run.fleet.size)

    def write(self, path: Path) -> None:
        """Write the first choice as a run file. Raises `ConfigError` if that cannot be."""
        try:
            write_run(self.run, path)
        except OSError as error:
            raise ConfigError(f"--write {path}: cannot write the run file: {error.strerror or error}") from error

    def table(self) -> Group:
        """Return the plan for the terminal, by `rich`."""
        return plan_tables(self)

    def to_fields(self) -> dict[str, Any]:
        """Return the plan as one JSON-able document; what is unknown is None."""
        return {
            "version": VERSION,
            "goal": self.wanted.goal,
            "slack": self.wanted.slack,
            "limits": {"hours": self.wanted.hours, "dollars": self.wanted.dollars},
            "samples": self.work.samples,
            "parameters": self.work.parameters,
            "first": self._fields(self.first),
            "options": [self._fields(option) for option in self.options],
            "changes": [
                {"axis": each.axis, "factor": each.factor, "turns": each.turns, "first": self._fields(each.option)}
                for each in self.changes
            ],
        }

    def _fields(self, option: Option) -> dict[str, Any]:
        run, forecast = option.run, option.forecast
        return {
            "rule": run.rule.to_table(),
            "told": settings_text(run.rule),
            "workers": run.fleet.size,
            "groups": [group.to_table() for group in run.fleet.workers],
            "steps": run.steps,
            "hours": forecast.seconds / HOUR_S,
            "dollars": forecast.dollars,
            "computing": forecast.computing,
            "sent_bytes": forecast.sent_bytes,
            "round_s": forecast.round_s,
            "loss_above_data_parallel": self.loss(option),
        }


def plan(
    work: Work,
    wanted: Wanted,
    *,
    rules: Sequence[SyncRule] | None = None,
    tell: Tell = lambda _made, _asked: None,
) -> Plan:
    """Return the plan for an amount of work: least time or least cost within limits, found by simulation.

    `rules` in place of those that are usually tried. Raises `ConfigError` where there is none, as when nothing keeps
    the limits, and says what the least would be.
    """
    wanted.check(dollars_per_s(work) is not None)
    tried = [*rules_of(work.run, 1), *rules_of(work.run, work.run.fleet.size)] if rules is None else rules
    work = replace(work, unfit=unfit(work, tried))
    made = asked = 0

    def count(answers: Iterable[Any], expected: int) -> Iterable[Any]:
        nonlocal made, asked
        asked += expected
        for answer in answers:
            made += 1
            tell(made, asked)
            yield answer

    with spread(work.run.real.threads) as each:

        def attempt(runs: Sequence[Run], work: Work) -> Iterable[Answer]:
            return count(each(partial(attempted, work=work), runs), len(runs))

        options = search(work, wanted, attempt, rules=rules, least_crews=COMPARED)
        first = wanted.choice(options)
        ways = [(axis, more) for axis in AXES for more in (False, True)]
        there = each(partial(changes, work, wanted, first, rules), ways)
        found = [change for some in count(there, len(ways)) for change in some]
    return Plan(work, wanted, first, wanted.kept(options), found)
