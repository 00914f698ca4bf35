"""One worker of a rule that nothing comes between is plain training: no weight, no share, no code is left in it."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import cluster
from plain import NOISY, Plain, close

from decentral.protocols import (
    DDP,
    EF21SGDM,
    AsyncLocalSGD,
    DynamicBackupWorkers,
    FedBuff,
    FedCompass,
    Float32,
    GradientCoding,
    OuterSGD,
    SyncRule,
)
from decentral.protocols.codecs import EF21, TopK
from decentral.sim.simulate import simulate

EVERYTHING: dict[str, Any] = {"codec": EF21(codec=TopK(chunk=6, k=6, values=Float32()))}
RULES: list[SyncRule] = [
    DDP(),
    EF21SGDM(eta=1.0, **EVERYTHING),
    GradientCoding(stragglers=0, outer=OuterSGD(lr=0.1)),
    DynamicBackupWorkers(period=3),
    FedBuff(period=3, buffer=1),
    FedCompass(period=3, alpha=1.0),
    AsyncLocalSGD(period=3, lr=1.0, momentum=0.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_one_worker_trains_as_if_alone(rule: SyncRule) -> None:
    run = cluster(rule, 1, 20, task=NOISY)
    plain = Plain(run)
    assert close(simulate(run).params[0], plain.sgd(0, range(20), plain.start(), 0.1))
