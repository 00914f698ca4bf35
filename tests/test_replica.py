"""A replica: flat buffers that train like torch does, fragments that are final when they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cluster import Net
from torch import Tensor, nn

from decentral.errors import TaskError
from decentral.inner import SGD, AdamW, Inner, Muon
from decentral.phantom import Phantom
from decentral.protocols import Buckets
from decentral.replica import Spans, TorchReplica, digest, evaluate, initial_model, seed_of
from decentral.task import Task
from decentral.tasks import Quadratic


def replica(task: Task, *, worker: int = 0, seed: int = 0, inner: Inner | None = None, **options: Any) -> TorchReplica:
    return TorchReplica(task, inner or SGD(lr=0.1), worker=worker, seed=seed, batch_size=4, total_steps=100, **options)


class Chatty(Net):
    """Dropout, batch norm, tied weights and a parameter that no loss reaches."""

    poison_step: int = -1
    poison: float = float("nan")

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 8))
        model[4].weight = model[3].weight
        model.add_module("unused", nn.Linear(3, 3))
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = batch[0]
        for layer in list(model.children())[:5]:
            hidden = layer(hidden)
        return (hidden.mean(dim=1, keepdim=True) - batch[1]).square().mean()


@pytest.mark.parametrize("inner", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9, nesterov=True), AdamW(lr=0.05)])
def test_training_equals_torch_on_the_model_itself(inner: Inner) -> None:
    task = Net()
    trained = replica(task, inner=inner)
    trained.train(0, 12)
    model = initial_model(task, 0)
    if isinstance(inner, AdamW):
        optimizer: Any = torch.optim.AdamW(
            model.parameters(), lr=inner.lr, betas=inner.betas, weight_decay=inner.weight_decay
        )
    else:
        assert isinstance(inner, SGD)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=inner.momentum, nesterov=inner.nesterov)
    for step in range(12):
        optimizer.zero_grad()
        task.loss(model, task.batch(0, 4 * step, 4)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.allclose(trained.params, expected, atol=1e-6)


def test_the_model_lives_in_the_flat_buffer() -> None:
    made = replica(Net())
    made.params.zero_()
    assert all(not bool(parameter.any()) for parameter in made.model.parameters())
    storage = (torch.zeros(made.layout.size), torch.zeros(made.layout.size))
    moved = replica(Net(), storage=storage)
    assert moved.params is storage[0]
    assert moved.grads is storage[1]
    moved.train(0, 1)
    assert all(values.abs().sum() > 0 for values in storage)


def test_steps_in_one_go_or_one_by_one_are_the_same_bits() -> None:
    together, apart, by_hand = replica(Chatty()), replica(Chatty()), replica(Chatty())
    together.train(0, 6)
    for step in range(6):
        apart.train(step, 1)
        by_hand.backward(step, [((0, by_hand.layout.size),)], lambda _index: None)
        by_hand.update(step)
    assert torch.equal(together.params, apart.params)
    assert torch.equal(together.params, by_hand.params)


@pytest.mark.parametrize(
    "inner", [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.1), Muon(lr=0.1)], ids=lambda inner: inner.name
)
def test_a_new_learning_rate_is_that_of_a_replica_made_with_it(inner: Inner) -> None:
    """The schedule goes on: what changes is the peak that it is a share of."""
    falling = inner.model_copy(update={"schedule": "cosine"})
    changed, made = replica(Net(), inner=falling), replica(Net(), inner=falling.model_copy(update={"lr": 0.03}))
    changed.set_learning_rate(0.03)
    for one in (changed, made):
        one.train(40, 5)
    assert torch.equal(changed.params, made.params)
    assert changed.inner == made.inner


def test_a_new_learning_rate_leaves_what_the_optimiser_remembers() -> None:
    """A heavy ball of 0.9 goes on rolling: at a rate ten times as small the next step is a tenth of what it was."""
    steps = []
    for lr in (0.1, 0.01):
        made = replica(Net(), inner=SGD(lr=0.1, momentum=0.9))
        made.train(0, 5)
        made.set_learning_rate(lr)
        before = made.params.clone()
        made.train(5, 1)
        steps.append(made.params - before)
    assert torch.allclose(steps[1], steps[0] / 10, atol=1e-7)


def test_randomness_depends_on_seed_worker_and_step_alone() -> None:
    def gradient(seed: int, worker: int, step: int) -> Tensor:
        made = replica(Chatty(), seed=seed, worker=worker)
        made.params.copy_(torch.linspace(-1, 1, made.layout.size))
        made.task = _SameBatch()
        torch.manual_seed(99)
        torch.rand(step + worker + 5)
        made.backward(step, [], lambda _index: None)
        return made.grads.clone()

    class _SameBatch(Chatty):
        def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
            return Net().batch(0, 0, size)

    base = gradient(1, 2, 3)
    torch.rand(7)
    assert torch.equal(gradient(1, 2, 3), base)
    assert not torch.equal(gradient(2, 2, 3), base)
    assert not torch.equal(gradient(1, 3, 3), base)
    assert not torch.equal(gradient(1, 2, 4), base)


def test_every_worker_starts_from_the_same_weights() -> None:
    torch.manual_seed(1)
    first = replica(Chatty(), worker=0)
    torch.manual_seed(2)
    second = replica(Chatty(), worker=5)
    assert torch.equal(first.params, second.params)
    assert first.digest() == second.digest()
    assert replica(Chatty(), seed=1).digest() != first.digest()


def test_making_a_model_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    initial_model(Net(), 0)
    assert torch.equal(torch.rand(3), expected)


# -- backward ---------------------------------------------------------------------------------------------------------


def cuts(made: TorchReplica) -> dict[str, list[Spans]]:
    size, entries = made.layout.size, made.layout.entries
    third = size // 3
    return {
        "whole": [((0, size),)],
        "each": [((entry.start, entry.stop),) for entry in entries],
        "buckets": [fragment.spans for fragment in Buckets(megabytes=1e-4).split(made.layout)],
        "across parameters": [((0, third),), ((third, 2 * third + 1),), ((2 * third + 1, size),)],
        "interleaved": [tuple((e.start, e.stop) for e in entries[offset::2]) for offset in (0, 1)],
    }


@pytest.mark.parametrize("cut", ["whole", "each", "buckets", "across parameters", "interleaved"])
@pytest.mark.parametrize("task", [Net(), Chatty(), Quadratic()], ids=["net", "chatty", "quadratic"])
def test_each_fragment_comes_once_and_is_final_when_it_comes(task: Task, cut: str) -> None:
    made = replica(task)
    fragments = cuts(made)[cut]
    for step in range(3):
        seen: dict[int, list[Tensor]] = {}

        def ready(index: int) -> None:
            assert index not in seen  # noqa: B023
            seen[index] = [made.grads[start:stop].clone() for start, stop in fragments[index]]  # noqa: B023

        made.backward(step, fragments, ready)
        assert sorted(seen) == list(range(len(fragments)))
        for index, parts in seen.items():
            for (start, stop), part in zip(fragments[index], parts, strict=True):
                assert torch.equal(part, made.grads[start:stop])


def test_the_last_layer_comes_first_and_the_unused_one_last() -> None:
    made = replica(Chatty())
    order: list[int] = []
    made.backward(0, cuts(made)["each"], order.append)
    names = [made.layout.entries[index].name for index in order]
    assert names.index("4.bias") < names.index("3.bias") < names.index("0.weight")
    assert {names[-1], names[-2]} == {"unused.weight", "unused.bias"}
    assert names.index("3.weight") > names.index("4.bias")


def test_the_cut_may_change_from_step_to_step_and_training_goes_on() -> None:
    made, plain = replica(Net()), replica(Net())
    for step, cut in enumerate(["each", "whole", "across parameters"]):
        made.backward(step, cuts(made)[cut], lambda _index: None)
        made.update(step)
    made.train(3, 2)
    plain.train(0, 5)
    assert torch.equal(made.params, plain.params)


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Poisoned(Net):
    step: int
    value: float

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch(worker, start, size)
        return inputs, targets * (self.value if start == self.step * size else 1.0)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_names_worker_and_step(value: float, shown: str) -> None:
    made = replica(Poisoned(step=7, value=value), worker=3)
    made.train(0, 5)
    with pytest.raises(TaskError, match=rf"worker 3: the loss of local step 7 is {shown}; lower inner\.lr"):
        made.train(5, 5)
    again = replica(Poisoned(step=7, value=value), worker=3)
    with pytest.raises(TaskError, match=rf"worker 3: the loss of local step 7 is {shown}"):
        again.backward(7, [], lambda _index: None)


class Broken(Net):
    where: str

    def model(self) -> nn.Module:
        if self.where == "model":
            raise RuntimeError("no weights here")
        return super().model()

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        if self.where == "batch" and start == 8:
            raise IndexError("out of data")
        return super().batch(worker, start, size)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        if self.where == "evaluate":
            raise ValueError("bad split")
        if self.where == "headline":
            return {"perplexity": 3.0}
        return {"loss": 1.0}


def test_errors_of_the_task_say_where_they_came_from() -> None:
    with pytest.raises(TaskError, match=r"task\.model\(\) raised RuntimeError: no weights here"):
        replica(Broken(where="model"))
    with pytest.raises(TaskError, match="worker 2: the task raised at local step 2: IndexError: out of data"):
        replica(Broken(where="batch"), worker=2).train(0, 4)
    with pytest.raises(TaskError, match=r"task\.evaluate\(\) raised ValueError: bad split"):
        replica(Broken(where="evaluate")).evaluate()
    with pytest.raises(TaskError, match=r"returned \['perplexity'\]; 'loss' and 'loss' must be among them"):
        replica(Broken(where="headline")).evaluate()


@pytest.mark.parametrize("where", ["nowhere", "evaluate"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_even_when_it_fails(where: str, training: bool) -> None:
    task = Broken(where=where)
    model = task.model()
    model.train(training)
    if where == "evaluate":
        with pytest.raises(TaskError):
            evaluate(task, model)
    else:
        assert evaluate(task, model) == {"loss": 1.0}
    assert model.training is training


def test_evaluation_and_loss_leave_training_alone() -> None:
    plain, curious = replica(Chatty()), replica(Chatty())
    for step in range(4):
        plain.train(step, 1)
        curious.train(step, 1)
        curious.evaluate()
        before = curious.params.clone()
        assert curious.loss(step) == pytest.approx(curious.loss(step))
        assert torch.equal(curious.params, before)
    assert curious.model.training


def test_slots_share_no_storage() -> None:
    made = replica(Net())
    copy, zeros = made.new_slot(made.params), made.new_slot(None)
    assert torch.equal(copy, made.params)
    assert not zeros.any()
    places = {tensor.data_ptr() for tensor in (copy, zeros, made.params, made.grads, made.new_slot(None))}
    assert len(places) == 5


# -- digests and seeds ------------------------------------------------------------------------------------------------


def test_a_digest_sees_every_bit_and_the_order() -> None:
    values = torch.arange(10.0)
    other = values.clone()
    other[7] = torch.nextafter(other[7], torch.tensor(99.0))
    assert digest([values]) == digest([values.clone()])
    assert digest([values]) != digest([other])
    assert digest([values, other]) != digest([other, values])
    assert digest([torch.zeros(1)]) != digest([-torch.zeros(1)])
    assert digest([values[::2]]) == digest([values[::2].clone()])
    assert digest([values[:4], values[4:]]) == digest([values])
    assert digest([]) == digest([torch.empty(0)]) == digest([Phantom(5)]) == 0  # type: ignore[list-item]


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    assert seed_of(0, "step", 1, 2) == seed_of(0, "step", 1, 2)
    seeds = {seed_of(*parts) for parts in [(0,), (1,), (0, 0), ("0",), (0, "step", 1, 2), (0, "step", 2, 1), (0, "s")]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("known") == 3588336365282376146  # in every process, on every machine
