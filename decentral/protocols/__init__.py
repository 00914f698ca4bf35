"""Sync rules, and the five parts they are made of. See ARCHITECTURE.md for how to write one."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from decentral.protocols.codecs import CODECS, BFloat16, Codec, Float32, Int8
from decentral.protocols.ddp import DDP
from decentral.protocols.diloco import DiLoCo
from decentral.protocols.fragments import CUTS, Buckets, Cut, Layers, Whole
from decentral.protocols.gossip import Gossip
from decentral.protocols.local_sgd import LocalSGD
from decentral.protocols.merge import OUTERS, Nesterov, Outer, OuterSGD
from decentral.protocols.naming import part_named
from decentral.protocols.noloco import NoLoCo
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import SCHEDULES, Every, Schedule
from decentral.protocols.single_merge import SingleMerge
from decentral.protocols.topology import TOPOLOGIES, All, Exponential, RandomGroups, Ring, Topology

RULES: dict[str, type[SyncRule]] = {rule.name: rule for rule in (DDP, LocalSGD, DiLoCo, NoLoCo, Gossip, SingleMerge)}
RuleField = Annotated[SyncRule, BeforeValidator(lambda value: part_named(value, RULES, SyncRule, "rule"))]

__all__ = [
    "CODECS",
    "CUTS",
    "DDP",
    "OUTERS",
    "RULES",
    "SCHEDULES",
    "TOPOLOGIES",
    "All",
    "BFloat16",
    "Buckets",
    "Codec",
    "Cut",
    "DiLoCo",
    "Every",
    "Exponential",
    "Float32",
    "Gossip",
    "Int8",
    "Layers",
    "LocalSGD",
    "Nesterov",
    "NoLoCo",
    "Outer",
    "OuterSGD",
    "RandomGroups",
    "Ring",
    "RuleField",
    "Schedule",
    "SingleMerge",
    "SyncRule",
    "Topology",
    "Whole",
]
