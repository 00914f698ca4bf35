"""Outer state in host memory: the same bits, and nothing of it on the device."""

from __future__ import annotations

from typing import Any

import torch
from cluster import NET, cluster
from sockets import train_here

from decentral.inner import AdamW
from decentral.offload import OffloadedReplica
from decentral.protocols import DDP, DiLoCo
from decentral.replica import TorchReplica


def both(**fields: Any) -> list[TorchReplica]:
    run = cluster(DiLoCo(period=2), 2, task=NET, **fields)
    return [
        kind(run.make_task(), AdamW(lr=0.01), worker=0, seed=3, batch_size=4, total_steps=10)
        for kind in (TorchReplica, OffloadedReplica)
    ]


def test_training_on_copies_comes_to_the_same_bits() -> None:
    plain, offloaded = both()
    for step in (0, 3):
        assert plain.train(step, 3) == offloaded.train(step, 3)
        assert torch.equal(plain.params, offloaded.params)
        for replica in (plain, offloaded):
            replica.params.mul_(0.9)  # what a rule does between phases
    assert plain.loss(6) == offloaded.loss(6)
    assert plain.evaluate() == offloaded.evaluate()
    assert plain.digest() == offloaded.digest()


def test_gradients_cross_as_fragments_become_final() -> None:
    plain, offloaded = both()
    fragments = [((0, 10),), ((10, plain.layout.size),)]
    seen: list[int] = []

    def ready(index: int) -> None:
        for start, stop in fragments[index]:
            assert torch.equal(offloaded.grads[start:stop], plain.grads[start:stop])
        seen.append(index)

    plain.backward(0, fragments, lambda _index: None)
    offloaded.backward(0, fragments, ready)
    assert sorted(seen) == [0, 1]
    for replica in (plain, offloaded):
        replica.grads.mul_(0.5)  # what an all-reduce does
        replica.update(0)
    assert torch.equal(plain.params, offloaded.params)


def test_what_a_rule_holds_shares_nothing_with_the_model() -> None:
    _plain, offloaded = both()
    model = {parameter.untyped_storage().data_ptr() for parameter in offloaded.model.parameters()}
    held = [offloaded.params, offloaded.grads, offloaded.new_slot(None), offloaded.new_slot(offloaded.params)]
    assert not model & {values.untyped_storage().data_ptr() for values in held}
    assert {values.device.type for values in held} == {"cpu"}


def test_data_parallel_and_diloco_over_sockets_come_to_the_same_bits() -> None:
    for rule in (DDP(), DiLoCo(period=3)):
        run = cluster(rule, 2, 6, task=NET, inner=AdamW(lr=0.01))
        offloaded = run.model_copy(update={"real": run.real.model_copy(update={"offload": True})})
        plain, moved = train_here(run), train_here(offloaded)
        assert all(torch.equal(plain.params[worker], moved.params[worker]) for worker in (0, 1))
