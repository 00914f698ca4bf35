"""What local and DiLoCo rules promise alike of rounds: when they come, what is sent, what a skipped one leaves."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
import torch
from cluster import cluster, outcomes, quadratic, replicas
from plain import NOISY
from test_streaming_diloco import Strides
from torch import Tensor

from decentral.config import Run
from decentral.inner import SGD, AdamW
from decentral.peer import Peer
from decentral.protocols import (
    CO2,
    DESLOC,
    MTDAO,
    PALSGD,
    SAVIC,
    SPARTA,
    AutoLoCo,
    DecoupledDiLoCo,
    DiLoCo,
    EagerDiLoCo,
    FedHyper,
    FedSpeed,
    HierarchicalDiLoCo,
    LocalSGD,
    NoLoCo,
    SlowMo,
    SparseLoCo,
    StreamingDiLoCo,
    SyncRule,
    Whole,
)
from decentral.protocols.rounds import AllReduceRule, Round
from decentral.sim.simulate import simulate
from decentral.wire import SIGNAL, Packet, Tag

H = 5
RULES: dict[str, AllReduceRule] = {
    rule.name: rule
    for rule in (
        LocalSGD(period=H),
        SlowMo(period=H),
        CO2(period=H, beta=0.5),
        PALSGD(period=H, probability=0.3),
        AutoLoCo(period=H, reference=3),
        SAVIC(period=H, alpha=0.5),
        FedHyper(period=H, limit=1.5),
        FedSpeed(period=H),
        DESLOC(period=H, momentum_periods=(H,), variance_period=H),
        MTDAO(period=H),
        HierarchicalDiLoCo(period=H, rounds=2),
        DiLoCo(period=H),
        StreamingDiLoCo(period=H, fragments=Strides(count=2)),
        EagerDiLoCo(period=H),
        SparseLoCo(period=H),
        SPARTA(period=H, rate=0.5),
    )
}


def rules(*without: str) -> pytest.MarkDecorator:
    names = [name for name in RULES if name not in without]
    return pytest.mark.parametrize("rule", [RULES[name] for name in names], ids=names)


def run_of(rule: SyncRule, steps: int = 4 * H, **options: float) -> Run:
    inner = AdamW(lr=0.02) if isinstance(rule, DESLOC) else SGD(lr=0.05)
    return cluster(rule, 2, steps, task=NOISY, inner=inner, **options)  # type: ignore[arg-type]


class Sent(NamedTuple):
    worker: int
    step: int
    round: int
    piece: tuple[str, int]
    values: Tensor


@pytest.fixture
def contributed(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What every worker hands in to every round, after a look at where it lies."""
    found: list[Sent] = []
    contribute = Round.contribute

    def watched(round_: Round, values: Tensor, index: int = 0, weight: int = 1) -> None:
        peer: Peer = round_._peer
        live = [peer.params, peer.grads]
        kept = [slot for name, slot in peer.slots.items() if "anchor" in name or "momentum" in name]
        assert values.untyped_storage().data_ptr() not in {each.untyped_storage().data_ptr() for each in live + kept}
        found.append(Sent(peer.id, peer.step, round_.number, (round_._channel, index), values.clone()))
        contribute(round_, values, index, weight)

    monkeypatch.setattr(Round, "contribute", watched)
    return found


@rules()
def test_the_first_round_comes_after_exactly_h_steps_and_the_last_with_the_budget(
    rule: AllReduceRule, contributed: list[Sent]
) -> None:
    simulate(run_of(rule, steps=3 * H + 2))
    for worker in (0, 1):
        steps = [sent.step for sent in contributed if sent.worker == worker]
        assert steps[0] == H
        assert steps[-1] == 3 * H + 2


@rules()
def test_what_is_sent_lies_apart_from_what_is_trained_and_never_dies_away(
    rule: AllReduceRule, contributed: list[Sent]
) -> None:
    """An anchor that shares storage with the parameters has an outer gradient of zero from the second round on."""
    simulate(run_of(rule))
    first = {(sent.worker, sent.piece): sent.values.norm() for sent in contributed if sent.round == 1}
    later = [sent for sent in contributed if sent.round > 1]
    assert {sent.round for sent in later} >= {2, 3}
    assert all(sent.values.norm() > 0.01 * first[sent.worker, sent.piece] for sent in later)


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        (NoLoCo(period=H, gamma=0.4), "theta"),
        (DecoupledDiLoCo(period=H + 1, fragments=Whole(), quorum=2, radial=False), "push"),  # looks every 2 steps
    ],
    ids=["noloco", "decoupled_diloco"],
)
def test_so_it_is_with_rules_that_have_no_all_reduce(
    rule: NoLoCo | DecoupledDiLoCo, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int, Tensor]] = []
    send = Peer.send

    def watched(peer: Peer, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None]:
        if packet.codec != SIGNAL:
            assert packet.payload is not None
            kept = [peer.params, peer.grads, *peer.slots.values()]
            assert packet.payload.untyped_storage().data_ptr() not in {e.untyped_storage().data_ptr() for e in kept}
            if tag.part == part:
                found.append((tag.round, peer.step, packet.payload.view(torch.float32).clone()))
        return send(peer, to, tag, packet)

    monkeypatch.setattr(Peer, "send", watched)
    simulate(run_of(rule, latency_s=0.001))
    (first, step, vector), *later = found
    assert (first, step) == (1, rule.period if isinstance(rule, DecoupledDiLoCo) else H)
    assert max(round_ for round_, _, _ in later) >= 3
    for _, _, values in later:
        assert values.norm() > 1e-2
        assert not torch.equal(values, vector)


@rules("eager_diloco")  # which steps on its own part, whatever becomes of the others'
def test_if_every_round_is_skipped_neither_anchor_nor_momentum_changes(rule: AllReduceRule) -> None:
    """A patience shorter than the network's latency: nobody ever hears anybody."""
    channels = {"streaming_diloco": "fragment 1", "sparta": "mask 0"}
    run = run_of(rule, patience_s=0.001)
    outcome = simulate(run)
    said = outcomes(outcome, channels.get(rule.name, "sync"))
    assert len(said) > 1
    assert said == [{("skipped", (0, 1))}] * len(said)
    start = torch.full((12,), quadratic(run).start)
    unchanged = {
        "momentum": torch.zeros(12),
        "anchor": start,
        "anchor.exp_avg": torch.zeros(12),
        "moved": torch.zeros(12),
        "scale": torch.ones(12),
        "held": torch.zeros(12),
        "last": torch.zeros(12),
        "factor": torch.ones(1),
    }
    for slots in outcome.slots.values():
        found = {name: slot for name, slot in slots.items() if name in unchanged}
        assert found
        for name, slot in found.items():
            assert torch.equal(slot, unchanged[name]), name


@rules("eager_diloco", "palsgd", "sparta")  # their workers differ even so, or must be several
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_with_the_same_data_are_as_good_as_one(rule: AllReduceRule, workers: int) -> None:
    """Means of two and of four equal numbers are exact: the same bits."""
    same = {"name": "quadratic", "dimension": 12, "spread": 0.0}
    inner = run_of(rule).inner
    alone, rows = (replicas(simulate(cluster(rule, each, 18, task=same, inner=inner))) for each in (1, workers))
    assert torch.equal(rows, alone.expand_as(rows))
