"""Sync rules, and the five parts they are made of. See ARCHITECTURE.md for how to write one."""

from __future__ import annotations

from decentral.protocols.a2cid2 import A2CiD2
from decentral.protocols.ad_psgd import ADPSGD
from decentral.protocols.adaptive_braking import AdaptiveBraking
from decentral.protocols.async_local_sgd import AsyncLocalSGD
from decentral.protocols.autoloco import AutoLoCo
from decentral.protocols.co2 import CO2
from decentral.protocols.codecs import (
    CODECS,
    DCT,
    E3M0,
    EF21,
    BFloat16,
    Codec,
    Dynamic8,
    ErrorFeedback,
    Float16,
    Float32,
    Int4,
    Int8,
    OneByte,
    PowerSGD,
    SignMagnitude,
    Sketch,
    TopK,
)
from decentral.protocols.dadao import DADAO
from decentral.protocols.dbw import DynamicBackupWorkers
from decentral.protocols.ddp import DDP
from decentral.protocols.decoupled_diloco import DecoupledDiLoCo
from decentral.protocols.demo import DeMo, Psyche, Sign
from decentral.protocols.des_loc import DESLOC, MTDAO
from decentral.protocols.diloco import DiLoCo
from decentral.protocols.eager_diloco import EagerDiLoCo
from decentral.protocols.ef21_sgdm import EF21SGDM
from decentral.protocols.factored_gossip import FactoredGossip
from decentral.protocols.fedbuff import FedBuff
from decentral.protocols.fedcompass import FedCompass
from decentral.protocols.fedhyper import FedHyper
from decentral.protocols.fedkseed import FedKSeed
from decentral.protocols.fedspeed import FedSpeed
from decentral.protocols.fragments import CUTS, Balanced, Buckets, Cut, Layers, Whole
from decentral.protocols.gasloc import GASLoC
from decentral.protocols.gossip import Gossip
from decentral.protocols.gradient_coding import GradientCoding
from decentral.protocols.graphs import Edges, Exponential, Ring, Torus
from decentral.protocols.heloco import HeLoCo
from decentral.protocols.hierarchical import HierarchicalDiLoCo
from decentral.protocols.just_one_byte import JustOneByte
from decentral.protocols.local_sgd import LocalSGD
from decentral.protocols.m_sgc import MSGC
from decentral.protocols.merge import MERGES, Mean, Merge
from decentral.protocols.modest import MoDeST
from decentral.protocols.noloco import NoLoCo
from decentral.protocols.outer import OUTERS, Nesterov, Outer, OuterSGD
from decentral.protocols.palsgd import PALSGD
from decentral.protocols.pbt import PBT
from decentral.protocols.robust import (
    CenteredClipping,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    TrimmedMean,
)
from decentral.protocols.rule import SyncRule
from decentral.protocols.savic import SAVIC
from decentral.protocols.schedule import QSR, SCHEDULES, DyLU, Every, Growing, MatchedRandom, Schedule, Timed
from decentral.protocols.sgp import SGP
from decentral.protocols.single_merge import SingleMerge
from decentral.protocols.slowmo import SlowMo
from decentral.protocols.sparse_loco import SparseLoCo, SparseMean
from decentral.protocols.sparta import SPARTA
from decentral.protocols.sr_sgc import SRSGC
from decentral.protocols.streaming_diloco import StreamingDiLoCo
from decentral.protocols.topology import TOPOLOGIES, All, RandomGroups, Topology

RULES = SyncRule.built_in
RULES.update({rule.name: rule for rule in (DDP, LocalSGD, DiLoCo, NoLoCo, Gossip, SingleMerge)})
RULES.update({rule.name: rule for rule in (SGP, GASLoC, FactoredGossip, ADPSGD, A2CiD2, DADAO, MoDeST)})
RULES.update({rule.name: rule for rule in (SlowMo, CO2, PALSGD, AutoLoCo, HierarchicalDiLoCo, SAVIC, DESLOC, MTDAO)})
RULES.update({rule.name: rule for rule in (FedHyper, FedSpeed, PBT)})
RULES.update({rule.name: rule for rule in (StreamingDiLoCo, EagerDiLoCo, SparseLoCo, DecoupledDiLoCo, SPARTA)})
RULES.update({rule.name: rule for rule in (AsyncLocalSGD, FedBuff, FedCompass, DynamicBackupWorkers)})
RULES.update({rule.name: rule for rule in (GradientCoding, SRSGC, MSGC, EF21SGDM, DeMo, Psyche, JustOneByte, FedKSeed)})

__all__ = [
    "ADPSGD",
    "CO2",
    "CODECS",
    "CUTS",
    "DADAO",
    "DCT",
    "DDP",
    "DESLOC",
    "E3M0",
    "EF21",
    "EF21SGDM",
    "MERGES",
    "MSGC",
    "MTDAO",
    "OUTERS",
    "PALSGD",
    "PBT",
    "QSR",
    "RULES",
    "SAVIC",
    "SCHEDULES",
    "SGP",
    "SPARTA",
    "SRSGC",
    "TOPOLOGIES",
    "A2CiD2",
    "AdaptiveBraking",
    "All",
    "AsyncLocalSGD",
    "AutoLoCo",
    "BFloat16",
    "Balanced",
    "Buckets",
    "CenteredClipping",
    "Codec",
    "Cut",
    "DeMo",
    "DecoupledDiLoCo",
    "DiLoCo",
    "DyLU",
    "Dynamic8",
    "DynamicBackupWorkers",
    "EagerDiLoCo",
    "Edges",
    "ErrorFeedback",
    "Every",
    "Exponential",
    "FactoredGossip",
    "FedBuff",
    "FedCompass",
    "FedHyper",
    "FedKSeed",
    "FedSpeed",
    "Float16",
    "Float32",
    "GASLoC",
    "GeometricMedian",
    "Gossip",
    "GradientCoding",
    "Growing",
    "HeLoCo",
    "HierarchicalDiLoCo",
    "Int4",
    "Int8",
    "JustOneByte",
    "Krum",
    "Layers",
    "LocalSGD",
    "MatchedRandom",
    "Mean",
    "Median",
    "Merge",
    "MoDeST",
    "MultiKrum",
    "NearestNeighborMixing",
    "Nesterov",
    "NoLoCo",
    "OneByte",
    "Outer",
    "OuterSGD",
    "PowerSGD",
    "Psyche",
    "RandomGroups",
    "Ring",
    "Schedule",
    "Sign",
    "SignMagnitude",
    "SingleMerge",
    "Sketch",
    "SlowMo",
    "SparseLoCo",
    "SparseMean",
    "StreamingDiLoCo",
    "SyncRule",
    "Timed",
    "TopK",
    "Topology",
    "Torus",
    "TrimmedMean",
    "Whole",
]
