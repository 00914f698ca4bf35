"""What holds for every rule that does without an all-reduce: rounds of timing-only runs, lossy codecs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cluster import cluster, quadratic, replicas

from decentral.journal import Left, Synced
from decentral.protocols import (
    ADPSGD,
    DADAO,
    SGP,
    A2CiD2,
    Codec,
    FactoredGossip,
    GASLoC,
    Gossip,
    Int8,
    MoDeST,
    NoLoCo,
    Ring,
    SingleMerge,
    SyncRule,
    Torus,
)
from decentral.protocols.codecs import E3M0
from decentral.sim.simulate import simulate

RULES: dict[str, tuple[type[SyncRule], dict[str, Any]]] = {
    "noloco": (NoLoCo, {"period": 3, "gamma": 0.5}),
    "gossip on a torus": (Gossip, {"period": 3, "topology": Torus()}),
    "sgp": (SGP, {"period": 3}),
    "gasloc": (GASLoC, {"period": 3}),
    "factored_gossip": (FactoredGossip, {"period": 3}),
    "ad_psgd": (ADPSGD, {"period": 3}),
    "a2cid2": (A2CiD2, {"period": 3}),
    "dadao": (DADAO, {"smoothness": 1.0, "convexity": 0.1, "topology": Ring()}),
    "modest": (MoDeST, {"period": 3, "committee": 2}),
    "single_merge": (SingleMerge, {"period": 3, "rate": 0.7, "window": (0.4, 0.6), "evaluate_merged": 3}),
}
each_rule = pytest.mark.parametrize("name", RULES)


def made(name: str, **fields: Any) -> SyncRule:
    cls, own = RULES[name]
    return cls(**{**own, **fields})


@each_rule
def test_a_timing_only_run_takes_as_long_and_sends_as_much(name: str) -> None:
    run = cluster(made(name), 6, 24, task={"name": "quadratic", "dimension": 2000}, jitter=0.2)
    whole, timing = simulate(run), simulate(run, timing_only=True)

    def kept(records: list[Any]) -> list[Any]:
        found = [record for record in records if isinstance(record, (Synced, Left))]
        return sorted(found, key=lambda record: (record.time_s, record.worker))  # at one instant any order will do

    assert kept(timing.records) == kept(whole.records)
    assert timing.seconds == whole.seconds


@pytest.mark.parametrize(
    ("name", "codec"),
    [(name, codec) for name in RULES for codec in (Int8(), E3M0()) if (name, codec) != ("modest", E3M0())],
)
def test_lossy_codecs_send_less_and_still_descend(name: str, codec: Codec) -> None:
    task = {"name": "quadratic", "dimension": 2000}
    exact = simulate(cluster(made(name), 4, 24, task=task))
    run = cluster(made(name, codec=codec), 4, 24, task=task)
    outcome = simulate(run)
    assert not torch.equal(replicas(outcome), replicas(exact))
    sent = [sum(record.sent_bytes for record in each.left()) for each in (outcome, exact)]
    assert sent[0] < (0.7 if name == "single_merge" else 0.4) * sent[1]
    best = quadratic(run).optimum(4)
    error, at_first = (replicas(outcome).mean(dim=0) - best).norm(), (quadratic(run).start - best).norm()
    assert error < 0.8 * at_first
