"""A run that is killed and goes on from its checkpoint comes to the same bits and records as one that was not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from lives import Lives, live, run_of
from torch import nn

from decentral.checkpoint import Archive, Desk, Found, Storage, keep, load, make_checkpoint, newest, records_before
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Evaluated, Joined, Record
from decentral.peer import Peer
from decentral.protocols import (
    ADPSGD,
    CO2,
    DDP,
    DESLOC,
    EF21SGDM,
    PALSGD,
    PBT,
    SAVIC,
    SGP,
    SPARTA,
    DecoupledDiLoCo,
    DeMo,
    DiLoCo,
    EagerDiLoCo,
    FedBuff,
    FedKSeed,
    FedSpeed,
    Gossip,
    HierarchicalDiLoCo,
    Int8,
    LocalSGD,
    NoLoCo,
    Psyche,
    SparseLoCo,
    StreamingDiLoCo,
    SyncRule,
)
from decentral.protocols.codecs import DCT, EF21, ErrorFeedback, PowerSGD, TopK
from decentral.tasks import Quadratic

NUMBERS = count()

RULES: dict[str, tuple[SyncRule, dict[str, Any]]] = {
    "diloco int8 with feedback": (DiLoCo(period=3, codec=ErrorFeedback(codec=Int8())), {}),
    "diloco top-k with feedback": (
        DiLoCo(period=3, codec=ErrorFeedback(codec=TopK(chunk=8, k=2)), all_reduce="gather"),
        {},
    ),
    "diloco by samples": (DiLoCo(period=3, weighted=True), {}),
    "ddp powersgd": (DDP(buckets="whole", codec=PowerSGD(rank=1), all_reduce="gather"), {}),  # type: ignore[arg-type]
    "noloco": (NoLoCo(period=3), {"workers": 4}),
    "noloco, two exchanges": (NoLoCo(period=3, gamma=0.5), {"workers": 4}),
    "gossip": (Gossip(period=3), {"workers": 4}),
    "sgp": (SGP(period=2), {}),
    "local_sgd": (LocalSGD(period=3), {}),
    "sgd with momentum": (LocalSGD(period=3), {"inner": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}),
    "muon": (DiLoCo(period=3), {"inner": {"name": "muon", "lr": 0.02}, "task": {"name": f"{__name__}:Normed"}}),
    "qhadam": (
        DESLOC(period=2),
        {"inner": {"name": "qhadam", "lr": 0.02, "decays": [0.9, 0.99], "weights": [0.5, 0.4]}},
    ),
    "adopt": (DESLOC(period=2), {"inner": {"name": "adopt", "lr": 0.02}}),
    "batch norm": (DiLoCo(period=3), {"task": {"name": f"{__name__}:Normed"}}),
    "evaluations": (DiLoCo(period=3), {"evaluate_every": 4}),
    "palsgd": (PALSGD(period=3, probability=0.5), {}),
    "fedspeed": (FedSpeed(period=3), {}),
    "savic": (SAVIC(period=3, alpha=0.5), {}),
    "hierarchical": (HierarchicalDiLoCo(period=1, rounds=3), {"workers": 4}),
    "pbt": (PBT(period=2, ready=3, groups=2, lr=(0.05, 0.2)), {"workers": 4}),
    "sparse_loco": (SparseLoCo(period=3), {}),
    "streaming_diloco": (StreamingDiLoCo(period=4, overlap=1), {"steps": 24}),
    "ef21_sgdm": (EF21SGDM(eta=0.5, codec=EF21(codec=TopK(chunk=8, k=4))), {}),
    "demo": (DeMo(codec=DCT(k=4)), {}),
}


SENT_AGAIN = {"noloco, two exchanges", "pbt"}
"""Rules that had sent something ahead, which they send once more: the same bits in another time, with more bytes."""


class Normed(Quadratic):
    """The bowls, seen through two layers with a batch normalisation between them whose mean is over all batches."""

    def model(self) -> nn.Module:
        """A module list, as Muon looks for matrices in layers."""
        layers = [nn.Linear(self.dimension, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4)]
        return nn.Sequential(nn.ModuleList(layers))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        values = batch[0] + batch[1] + torch.randn_like(batch[0])
        for layer in model[0]:  # type: ignore[index]
            values = layer(values)
        return values.square().mean() + (values.mean() - 1).square()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, self.batch(0, 0, 4)))}


async def here(work: Callable[[], Any]) -> Any:
    return work()


def checkpointed(run: Run, storage: Storage, times: int = 1) -> Lives:
    """Return the run, uninterrupted; in its course so many checkpoints come into the storage."""

    async def beside(peers: dict[int, Peer]) -> None:
        desk, archive = Desk(), Archive(storage, "a1b2", keep=2)
        archive.claim(resume=False)
        for peer in peers.values():
            peer.spawn(keep(peer, desk, storage, here))
        for _ in range(times):
            while any(peer.step < 4 or not peer.rounds_settled for peer in peers.values()):
                await asyncio.sleep(0.01)
            await make_checkpoint(desk, archive, list(peers), here, run=run.to_table(), timeout_s=100)

    return live(run, beside=beside)


def memory() -> Storage:
    return Storage(f"memory://checkpoints/{next(NUMBERS)}")


def resumed(run: Run, storage: Storage, found: Found) -> Lives:
    return live(run, restored={worker: load(storage, found, worker) for worker in range(run.fleet.size)})


def told(records: list[Record]) -> list[str]:
    """Return what every worker's records say, less that it came; which worker's line comes first is of no meaning.

    Seconds are rounded to nanoseconds: the clock of a second life begins at zero, and sums of floats are not exact.
    """
    return sorted(str(timed(dataclasses.asdict(record))) for record in records if not isinstance(record, Joined))


def timed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a record's fields with times rounded."""
    if isinstance(fields.get("seconds"), dict):
        fields["seconds"] = {what: round(seconds, 9) for what, seconds in fields["seconds"].items()}
    elif "seconds" in fields:
        fields["seconds"] = round(fields["seconds"], 9)
    return {**fields, "time_s": round(fields["time_s"], 9)}


@pytest.mark.parametrize("name", RULES)
def test_the_same_bits_and_the_same_journal(name: str) -> None:
    rule, fields = RULES[name]
    run, storage = run_of(rule, **fields), memory()
    whole = checkpointed(run, storage)
    found = newest(storage)
    assert found is not None
    assert 4 <= found.manifest.step < run.steps
    again = resumed(run, storage, found)
    assert again.bits() == whole.bits()
    if name not in SENT_AGAIN:
        assert told([*records_before(found.manifest.journal, whole.records), *again.records]) == told(whole.records)


def test_evaluations_come_neither_twice_nor_not_at_all() -> None:
    run, storage = run_of(DiLoCo(period=3), evaluate_every=4), memory()
    whole = checkpointed(run, storage)
    found = newest(storage)
    assert found is not None
    journal = [*records_before(found.manifest.journal, whole.records), *resumed(run, storage, found).records]
    assert [record.step for record in journal if isinstance(record, Evaluated)] == [0, 6, 9, 12, 16]


def test_a_checkpoint_of_a_run_that_went_on_from_one() -> None:
    run, storage = run_of(DiLoCo(period=2, codec=ErrorFeedback(codec=Int8())), steps=30), memory()
    whole = checkpointed(run, storage, times=3)
    assert len([name for name in storage.sizes() if name.endswith("manifest.json")]) == 2
    found = newest(storage)
    assert found is not None
    assert found.manifest.number == 3
    assert resumed(run, storage, found).bits() == whole.bits()


def test_more_workers_than_before_begin_where_one_of_them_was() -> None:
    """What is a worker's own stays its own: a worker that was not there has no residual, and no samples."""
    run, storage = run_of(DiLoCo(period=3, codec=ErrorFeedback(codec=Int8()))), memory()
    checkpointed(run, storage)
    found = newest(storage)
    assert found is not None
    old, new = load(storage, found, 1), load(storage, found, 4)  # 4 takes over from worker 4 % 3 = 1
    assert set(old.tensors) - set(new.tensors) == {"slot sync.0.residual"}
    assert new.life is None
    assert (new.step, new.rounds) == (old.step, old.rounds)
    assert all(values.equal(old.tensors[name]) for name, values in new.tensors.items())
    more = resumed(run_of(run.rule, workers=5), storage, found)
    fewer = resumed(run_of(run.rule, workers=2), storage, found)
    for lives in (more, fewer):
        bits = lives.bits()
        assert len({tensors["params"] for tensors in bits.values()}) == 1
        assert {peer.step for peer in lives.peers.values()} == {run.steps}


def test_what_all_hold_is_written_once() -> None:
    """DiLoCo at rest: parameters and anchor are equal, on all workers; momentum, moments and residuals are others."""
    run, storage = run_of(DiLoCo(period=3), task={"name": "quadratic", "dimension": 5000}), memory()
    checkpointed(run, storage)
    found = newest(storage)
    assert found is not None
    vector = 4 * 5000
    written = sum(piece.nbytes for file in found.manifest.files for piece in file.pieces)
    assert 2 * vector + 3 * 2 * vector <= written < 2 * vector + 3 * 2 * vector + 1000


@pytest.mark.parametrize("name", RULES)
def test_the_rules_above_may_have_checkpoints(name: str) -> None:
    RULES[name][0].check_checkpoints()


@pytest.mark.parametrize(
    "rule", [CO2(), EagerDiLoCo(), SPARTA(overlap=1), Psyche(), FedKSeed(), FedBuff(), ADPSGD(), DecoupledDiLoCo()]
)
def test_a_rule_that_never_rests_is_refused(rule: SyncRule) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.url: .* never at rest"):
        rule.check_checkpoints()
