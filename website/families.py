"""The kinds of part that a run file names: what each is called, and which are built in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from decentral.fleet.churn import Churn
from decentral.fleet.fleet import CHURN
from decentral.inner import INNER, Inner
from decentral.part import Part
from decentral.pipeline.paths import Paths
from decentral.pipeline.recovery import RECOVERIES, Recovery
from decentral.pipeline.settings import PATHS
from decentral.protocols import (
    CODECS,
    CUTS,
    MERGES,
    OUTERS,
    RULES,
    SCHEDULES,
    TOPOLOGIES,
    Codec,
    Cut,
    Merge,
    Outer,
    Schedule,
    SyncRule,
    Topology,
)
from decentral.task import Task
from decentral.tasks import TASKS


class Family(NamedTuple):
    """Parts of one kind. `page` is where they are described, with the heading `title` where several share it."""

    word: str
    base: type[Part]
    known: Mapping[str, type[Part]]
    page: str
    title: str


FAMILIES = (
    Family("rule", SyncRule, RULES, "rules.md", ""),
    Family("codec", Codec, CODECS, "codecs.md", ""),
    Family("task", Task, TASKS, "parts.md", "Tasks"),
    Family("inner optimiser", Inner, INNER, "parts.md", "Inner optimisers"),
    Family("schedule", Schedule, SCHEDULES, "parts.md", "Schedules"),
    Family("cut", Cut, CUTS, "parts.md", "Cuts into fragments"),
    Family("topology", Topology, TOPOLOGIES, "parts.md", "Topologies"),
    Family("merge", Merge, MERGES, "parts.md", "Merges"),
    Family("outer optimiser", Outer, OUTERS, "parts.md", "Outer optimisers"),
    Family("model of churn", Churn, CHURN, "parts.md", "Models of churn"),
    Family("kind of paths", Paths, PATHS, "parts.md", "Paths of microbatches"),
    Family("recovery", Recovery, RECOVERIES, "parts.md", "Recoveries of lost stages"),
)
"""In the order in which the site has them."""


def family_of(part: type[Part]) -> Family | None:
    """Return the family that the part belongs to, None for a section of the run file."""
    return next((family for family in FAMILIES if issubclass(part, family.base)), None)


def link(family: Family) -> str:
    """Return a link to where the family's parts are described."""
    anchor = f"#{family.title.lower().replace(' ', '-')}" if family.title else ""
    return f"[{family.word}]({family.page}{anchor})"
