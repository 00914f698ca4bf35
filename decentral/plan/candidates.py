"""Which rules are tried, under which settings, and which of them is nearest to data-parallel training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.plan.work import Work
from decentral.protocols import (
    DDP,
    E3M0,
    BFloat16,
    Codec,
    DiLoCo,
    Every,
    Float32,
    Int8,
    LocalSGD,
    NoLoCo,
    StreamingDiLoCo,
    SyncRule,
)

PERIODS = (10, 30, 100, 300)
"""H: of those whose loss Charles et al. have published (arXiv 2503.09799: 1, 5, 10, 30, 100, 300), the longer ones."""
GRADIENTS: tuple[Codec, ...] = (Float32(), BFloat16())
"""How gradients, and parameters themselves, travel without memory of what was lost."""
OUTER_GRADIENTS: tuple[Codec, ...] = (Float32(), Int8(), E3M0())
"""How outer gradients travel; E3M0 as in Streaming DiLoCo (arXiv 2501.18512)."""

R = TypeVar("R", bound=SyncRule)


def rules_of(run: Run, workers: int) -> list[SyncRule]:
    """Return the rules to be tried with so many workers, that nearest to data-parallel training first.

    They are data parallelism, DiLoCo, Streaming DiLoCo and NoLoCo; of each, more talk comes before less and what
    travels whole before what is rounded. Where the run file has a rule of one of these kinds, all of the kind have its
    other settings; one of another kind is tried last, as it is. One worker by itself does local steps.
    """
    if workers == 1:
        return [LocalSGD(period=Every(period=PERIODS[-1]))]
    own = run.rule if "rule" in run.model_fields_set else None
    every = [Every(period=period) for period in PERIODS]
    all_reduce = "gather" if workers == 2 else "butterfly"  # of two, each sends the other its change, once
    rules: list[SyncRule] = [_like(own, DDP, codec=codec) for codec in GRADIENTS]
    rules += [_like(own, DiLoCo, period=period, codec=codec) for period in every for codec in OUTER_GRADIENTS]
    rules += [_like(own, StreamingDiLoCo, period=period, all_reduce=all_reduce) for period in PERIODS[1:]]
    rules += [_like(own, NoLoCo, period=period, codec=codec) for period in every for codec in GRADIENTS]
    return rules if own is None or own in rules else [*rules, own]


def runs_of(work: Work, crew: Fleet, rules: Sequence[SyncRule] | None = None) -> Iterator[tuple[int, Run]]:
    """Yield the work done by a crew under each of the rules that can, with its place among them; None: `rules_of`."""
    base = work.run
    for place, rule in enumerate(rules_of(base, crew.size) if rules is None else rules):
        run = base.model_copy(update={"fleet": crew, "rule": rule, "steps": work.steps(crew.size)})
        if any((rule.spelling(), group.device) in work.unfit for group in crew.workers):
            continue
        try:
            run.check()
        except ConfigError:
            continue
        yield place, run


def _like(own: SyncRule | None, kind: type[R], **fields: Any) -> R:
    """Return a rule of that kind with these fields, and else those of the run file's rule if that is of the kind."""
    table = {name: getattr(own, name) for name in kind.model_fields} if type(own) is kind else {}
    return kind(**{**table, **fields})
