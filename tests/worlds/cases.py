"""Every rule, as it is run in both worlds: settings small enough that each of its parts is used within a few steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from decentral.protocols import (
    ADPSGD,
    CO2,
    DADAO,
    DDP,
    DESLOC,
    EF21SGDM,
    MSGC,
    MTDAO,
    PALSGD,
    PBT,
    QSR,
    SAVIC,
    SGP,
    SPARTA,
    SRSGC,
    A2CiD2,
    AdaptiveBraking,
    AsyncLocalSGD,
    AutoLoCo,
    Buckets,
    DecoupledDiLoCo,
    DeMo,
    DiLoCo,
    DyLU,
    DynamicBackupWorkers,
    EagerDiLoCo,
    Edges,
    Exponential,
    FactoredGossip,
    FedBuff,
    FedCompass,
    FedHyper,
    FedKSeed,
    FedSpeed,
    GASLoC,
    Gossip,
    GradientCoding,
    Growing,
    HeLoCo,
    HierarchicalDiLoCo,
    Int8,
    JustOneByte,
    Layers,
    LocalSGD,
    MatchedRandom,
    Median,
    MoDeST,
    Nesterov,
    NoLoCo,
    Psyche,
    Ring,
    SingleMerge,
    SlowMo,
    SparseLoCo,
    SparseMean,
    StreamingDiLoCo,
    SyncRule,
    Timed,
    Torus,
)
from decentral.protocols.codecs import DCT, E3M0, EF21, ErrorFeedback, PowerSGD, TopK

NET = {"name": "cluster:Net"}
ONE_LAYER = Layers(layers=1)


@dataclass(frozen=True)
class Case:
    """A rule and what a run with it needs.

    `exact`: what it comes to does not depend on who is quicker, so both worlds must come to the same bits and bytes.
    `timed`: how long it takes does not depend on losses, so a simulation of time alone must find the same.
    """

    rule: SyncRule
    workers: int = 3
    steps: int = 8
    exact: bool = True
    timed: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields of the run."""


CASES: dict[str, Case] = {
    "ddp": Case(DDP()),
    "ddp in buckets of int8": Case(DDP(buckets={"name": "buckets", "megabytes": 0.001}, codec=Int8())),  # type: ignore[arg-type]
    "local_sgd": Case(LocalSGD(period=3)),
    "diloco": Case(DiLoCo(period=3)),
    "diloco int8 ring": Case(DiLoCo(period=3, codec=Int8(), all_reduce="ring")),
    "diloco gather": Case(DiLoCo(period=3, all_reduce="gather")),
    "diloco e3m0": Case(DiLoCo(period=3, codec=E3M0(), all_reduce="gather")),
    "diloco e3m0, sums in four bits too": Case(DiLoCo(period=3, codec=E3M0())),
    "diloco topk with feedback": Case(DiLoCo(period=3, codec=ErrorFeedback(codec=TopK()), all_reduce="gather")),
    "diloco median": Case(DiLoCo(period=3, merge=Median(), all_reduce="gather")),
    "noloco": Case(NoLoCo(period=3)),
    "noloco with two exchanges": Case(NoLoCo(period=3, gamma=0.5)),
    "gossip": Case(Gossip(period=3)),
    "single_merge": Case(SingleMerge(period=3, rate=0.7)),
    "local_sgd, every step at first": Case(LocalSGD(period=3, switch_step=2)),
    "diloco, steps by speed": Case(DiLoCo(period=DyLU(period=6)), steps=24, exact=False),
    "noloco, steps by speed": Case(NoLoCo(period=DyLU(period=6)), steps=24, exact=False),
    "local_sgd by the clock": Case(LocalSGD(period=Timed(seconds=0.2)), steps=24, exact=False),
    "local_sgd in random phases": Case(LocalSGD(period=MatchedRandom(schedule=QSR(base=1, alpha=0.2)))),
    "slowmo": Case(SlowMo(period=3)),
    "co2": Case(CO2(period=2, beta=0.5)),
    "palsgd": Case(PALSGD(period=3, probability=0.5)),
    "autoloco": Case(AutoLoCo(period=Growing(base=1, horizon=2), reference=2)),
    "hierarchical": Case(HierarchicalDiLoCo(period=1, rounds=3), workers=4),
    "hierarchical with unequal regions": Case(HierarchicalDiLoCo(period=2, rounds=2, regions=(1, 2), codec=Int8())),
    "fedhyper": Case(FedHyper(period=2)),
    "fedhyper, all workers' rates": Case(FedHyper(period=2, adapts="inner")),
    "fedhyper, each worker's rate": Case(FedHyper(period=3, adapts="own")),
    "fedspeed": Case(FedSpeed(period=3)),
    "pbt": Case(PBT(period=2, ready=3, groups=2, lr=(0.05, 0.2)), workers=4, timed=False),
    "pbt, outer rates too": Case(
        PBT(period=1, ready=2, groups=2, lr=(0.01, 0.05), outer_lr=(0.5, 1.0), outer=Nesterov(momentum=0.5)),
        timed=False,
        fields={"inner": {"name": "adamw", "lr": 0.02}},
    ),
    "savic": Case(SAVIC(period=3, alpha=0.5)),
    "des_loc": Case(DESLOC(period=1, variance_period=4), fields={"inner": {"name": "adopt", "lr": 0.05}}),
    "des_loc int8": Case(DESLOC(period=2, codec=Int8()), fields={"inner": {"name": "adamw", "lr": 0.05}}),
    "mt_dao": Case(MTDAO(period=3), fields={"inner": {"name": "qhadam", "lr": 0.01}}),
    "diloco by samples": Case(DiLoCo(period=3, weighted=True)),
    "diloco with muon": Case(
        DiLoCo(period=3, outer=Nesterov(momentum=0.6)), fields={"inner": {"name": "muon", "lr": 0.02}, "task": NET}
    ),
    "streaming_diloco": Case(StreamingDiLoCo(period=4, fragments=ONE_LAYER), fields={"task": NET}),
    "streaming_diloco in buckets": Case(
        StreamingDiLoCo(period=4, fragments=ONE_LAYER, buckets=Buckets(megabytes=1e-4)), fields={"task": NET}
    ),
    "streaming_diloco whole": Case(StreamingDiLoCo(period=3, overlap=2, codec=Int8(), all_reduce="butterfly")),
    "eager_diloco": Case(EagerDiLoCo(period=2)),
    "sparse_loco": Case(SparseLoCo(period=3)),
    "sparse_loco by contributors": Case(SparseLoCo(period=3, merge=SparseMean(normalise="contributors"))),
    "sparta": Case(SPARTA(rate=0.1)),
    "sparta late": Case(SPARTA(period=2, rate=0.1, overlap=2)),
    "decoupled_diloco": Case(DecoupledDiLoCo(period=4), steps=16, exact=False),
    "decoupled_diloco heloco": Case(
        DecoupledDiLoCo(period=4, quorum=2, outer=HeLoCo(momentum=0.5)), steps=16, exact=False
    ),
    "noloco with phi ahead, int8": Case(NoLoCo(period=2, gamma=0.5, codec=Int8())),
    "gossip on a ring": Case(Gossip(period=2, topology=Ring())),
    "gossip on a torus": Case(Gossip(period=2, topology=Torus()), workers=4),
    "gossip on a path": Case(Gossip(period=2, topology=Edges(edges=((0, 1), (1, 2))))),
    "sgp": Case(SGP(period=2), exact=False),
    "sgp int8": Case(SGP(period=2, topology=Exponential(), codec=Int8()), exact=False),
    "gasloc": Case(GASLoC(period=3)),
    "factored_gossip": Case(FactoredGossip(period=3)),
    "ad_psgd": Case(ADPSGD(period=2), exact=False),
    "a2cid2": Case(A2CiD2(period=2), exact=False),
    "modest": Case(MoDeST(period=2, committee=2), exact=False),
    "dadao": Case(DADAO(smoothness=1.0, convexity=0.1)),
    "single_merge with a window and looks": Case(SingleMerge(period=2, rate=0.7, window=(0.4, 0.5), evaluate_merged=1)),
    "async_local_sgd": Case(AsyncLocalSGD(period=2), exact=False),
    "async_local_sgd, every push": Case(AsyncLocalSGD(period=2, delay=1, lr=0.3, grace_s=0, codec=Int8()), exact=False),
    "fedbuff": Case(FedBuff(period=2, buffer=2), exact=False),
    "fedbuff that brakes": Case(FedBuff(period=2, buffer=2, outer=AdaptiveBraking(lr=0.3)), exact=False),
    "fedcompass": Case(FedCompass(period=4, ratio=2), exact=False),
    "dbw": Case(DynamicBackupWorkers(period=2), exact=False),
    "gradient_coding": Case(GradientCoding(), exact=False),
    "sr_sgc": Case(SRSGC(), exact=False),
    "m_sgc": Case(MSGC(window=2), steps=12, exact=False),
    "ef21_sgdm": Case(EF21SGDM(eta=0.5, codec=EF21(codec=TopK(chunk=8, k=4)))),
    "demo": Case(DeMo(codec=DCT(k=4))),
    "psyche": Case(Psyche()),
    "just_one_byte": Case(JustOneByte(samples=4), fields={"inner": {"name": "sgd", "lr": 0.01}}),
    "fedkseed": Case(FedKSeed(period=3, seeds=64), fields={"inner": {"name": "sgd", "lr": 0.01}}),
    "ddp powersgd": Case(DDP(buckets="whole", codec=PowerSGD(rank=1), all_reduce="gather")),  # type: ignore[arg-type]
}
