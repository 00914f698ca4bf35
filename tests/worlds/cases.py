"""Every rule, as it is run in both worlds: settings small enough that each of its parts is used within a few steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from decentral.protocols import DDP, DiLoCo, Gossip, Int8, LocalSGD, NoLoCo, SingleMerge, SyncRule


@dataclass(frozen=True)
class Case:
    """A rule and what a run with it needs.

    `exact`: what it comes to does not depend on who is quicker, so both worlds must come to the same bits and bytes.
    """

    rule: SyncRule
    workers: int = 3
    steps: int = 8
    exact: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields of the run."""


CASES: dict[str, Case] = {
    "ddp": Case(DDP()),
    "ddp in buckets of int8": Case(DDP(buckets={"name": "buckets", "megabytes": 0.001}, codec=Int8())),  # type: ignore[arg-type]
    "local_sgd": Case(LocalSGD(period=3)),
    "diloco": Case(DiLoCo(period=3)),
    "diloco int8 ring": Case(DiLoCo(period=3, codec=Int8(), all_reduce="ring")),
    "diloco gather": Case(DiLoCo(period=3, all_reduce="gather")),
    "noloco": Case(NoLoCo(period=3)),
    "noloco with two exchanges": Case(NoLoCo(period=3, gamma=0.5)),
    "gossip": Case(Gossip(period=3)),
    "single_merge": Case(SingleMerge(period=3, rate=0.7)),
}
