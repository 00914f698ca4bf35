"""What all local methods promise: equal replicas after a death, with codecs that lose, and in time alone."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, outcomes, replicas, rounds, timed_by_messages

from decentral.inner import SGD, AdamW, Inner
from decentral.journal import Trained
from decentral.protocols import CO2, DDP, DESLOC, MTDAO, PALSGD, QSR, SAVIC, AutoLoCo, LocalSGD, SlowMo, SyncRule
from decentral.protocols.codecs import E3M0, Codec, Int8
from decentral.sim.simulate import simulate

RULES: list[SyncRule] = [
    LocalSGD(period=3, switch_step=2),
    LocalSGD(period=QSR(base=3, alpha=0.1)),
    SlowMo(period=3),
    CO2(period=3, beta=0.5),
    PALSGD(period=3, probability=0.4),
    AutoLoCo(period=3, reference=2),
    SAVIC(period=3, alpha=0.5),
    DESLOC(period=3),
    MTDAO(period=3),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} {rule.period}")


def inner_of(rule: SyncRule) -> Inner:
    return AdamW(lr=0.02) if isinstance(rule, DESLOC) else SGD(lr=0.1)


@every_rule
def test_survivors_of_a_death_go_on_with_equal_replicas(rule: SyncRule) -> None:
    run = cluster(rule, 4, 12, task=NET, inner=inner_of(rule), events=[crash(0.3, 2)], patience_s=5.0)
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1, 3]
    assert all_equal(outcome)
    found = outcomes(outcome)
    assert all(len(said) == 1 for said in found)
    assert found[-1] == {("committed", (0, 1, 3))}


@every_rule
@pytest.mark.parametrize("codec", [Int8(), E3M0()], ids=lambda codec: codec.name)
def test_lossy_codecs_keep_replicas_equal_and_near(rule: SyncRule, codec: Codec) -> None:
    fields = {field: getattr(rule, field) for field in type(rule).model_fields}
    plain, lossy = (
        simulate(cluster(type(rule)(**{**fields, "codec": each}), 3, 9, task=NET, inner=inner_of(rule)))
        for each in ("float32", codec)
    )
    assert all_equal(lossy)
    difference = (lossy.params[0] - plain.params[0]).norm()
    assert 0 < difference < 0.2 * plain.params[0].norm()
    assert lossy.left()[0].sent_bytes < plain.left()[0].sent_bytes


@every_rule
def test_time_alone_has_the_same_rounds_and_bytes(rule: SyncRule) -> None:
    run = cluster(rule, 3, 9, task=NET, inner=inner_of(rule))
    timed, trained = simulate(run, timing_only=True), simulate(run)
    assert timed_by_messages(run).seconds == trained.seconds
    assert timed.seconds == pytest.approx(trained.seconds, rel=0, abs=1e-9)
    assert timed.left()[0].sent_bytes == trained.left()[0].sent_bytes
    assert outcomes(timed) == outcomes(trained)


# -- post-local SGD ---------------------------------------------------------------------------------------------------


def test_post_local_sgd_averages_each_step_and_then_every_h() -> None:
    outcome = simulate(cluster(LocalSGD(period=5, switch_step=3), 2, 15))
    phases = [record.steps for record in outcome.records if isinstance(record, Trained) and record.worker == 0]
    assert phases == [1, 1, 1, 5, 5, 2]
    assert len(rounds(outcome)) == 6


def test_before_the_switch_it_is_data_parallel_and_without_it_local_sgd() -> None:
    inner = SGD(lr=0.1, momentum=0.9)
    before = simulate(cluster(LocalSGD(period=5, switch_step=20), 3, 20, task=NET, inner=inner))
    data_parallel = simulate(cluster(DDP(), 3, 20, task=NET, inner=inner))
    assert torch.allclose(before.params[0], data_parallel.params[0], atol=2e-6)
    after, local = (
        simulate(cluster(LocalSGD(period=5, **fields), 3, 20, task=NET, inner=inner))
        for fields in ({"switch_step": 0}, {})
    )
    assert torch.equal(replicas(after), replicas(local))
