"""Small replicas that compute their local steps at once come to the bits that each comes to by itself."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_engine import Norms, bits
from torch import Tensor, nn

from decentral.config import Run, validated
from decentral.errors import Diverged, TaskError
from decentral.inner import INNER
from decentral.replica import TorchReplica, initial_model
from decentral.sim.engine import replicas as engine
from decentral.sim.engine import together
from decentral.sim.engine.together import SIZES, Together, joined
from decentral.sim.simulate import simulate
from decentral.task import Task

GPT = {"name": "byte_gpt", "width": 16, "depth": 2, "heads": 2, "context": 16, "eval_windows": 8}


class Classes(Task):
    """A perceptron that classifies; from a sample on, its losses are no numbers."""

    name: ClassVar[str] = "classes"
    breaks: tuple[int, int] = (-1, -1)
    """Worker and sample."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 5))

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(1_000 * worker + start)
        values = torch.randn(size, 6, generator=draws)
        return values * (math.nan if (worker, start) == self.breaks else 1), values.argmax(dim=1) % 5

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, self.batch(99, 0, 64)))}


def run_of(rule: Any, task: dict[str, Any], processes: int = 2, **fields: Any) -> Run:
    table = {"steps": 20, "batch_size": 4, "evaluate_every": 5, "task": task, "rule": rule}
    inner = {"name": "adamw", "lr": 0.01, "clip_norm": 1.0}
    fleet = {"workers": [{"count": 6}, {"count": 3, "speed": 0.5}], "jitter": 0.3}
    return validated({**table, "inner": inner, "fleet": fleet, "sim": {"processes": processes}, **fields}, "test")


def replica(run: Run, worker: int) -> TorchReplica:
    return TorchReplica(
        run.make_task(), run.inner, worker=worker, seed=0, batch_size=run.batch_size, total_steps=run.steps
    )


def forced(run: Run, task: Task, first: nn.Module, processes: int) -> Together:
    """Whether it pays or not."""
    return Together(engine._replica(run, task, first, 0))


@pytest.mark.parametrize("rule", ["diloco", "noloco"])
def test_a_simulation_comes_to_the_same_journal_and_parameters(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"name": rule, "period": 5}
    apart = bits(simulate(run_of(table, GPT, processes=1)))
    monkeypatch.setattr(engine, "_together", forced)
    assert bits(simulate(run_of(table, GPT))) == apart


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("ahead", [0, 2], ids=["all at the same step", "one ahead of the others"])
def test_parameters_gradients_and_optimisers_come_to_the_same_bits(name: str, ahead: int) -> None:
    """Twice, so that what the optimisers keep is taken over; one replica takes longer steps from then on."""
    inner = {"name": name, "lr": 0.01, "clip_norm": 0.3, "schedule": "cosine"}
    run = run_of("diloco", GPT, inner=inner | ({"momentum": 0.9} if name == "sgd" else {}))
    group, apart = ([replica(run, worker) for worker in range(3)] for _ in range(2))
    together, begun = Together(group[0]), [0, ahead, 0]
    for each in (group, apart):
        if ahead:
            each[1].train(0, ahead)
    for _ in range(2):
        losses = together.train(group, begun, 3)
        ends = [each.train(first, 3) for each, first in zip(apart, begun, strict=True)]
        assert [each.judged(0, own) for each, own in zip(group, losses, strict=True)] == ends
        for one, other in zip(group, apart, strict=True):
            assert one.params.equal(other.params)
            assert one.grads.equal(other.grads)
            assert one.inner_steps == other.inner_steps
            for kept in (*run.inner.momenta, *run.inner.variances):
                assert one.inner_state(kept).equal(other.inner_state(kept)), kept
        begun = [first + 3 for first in begun]
        for each in (group, apart):
            each[2].set_learning_rate(0.02)


def test_who_diverges_is_named_and_the_others_go_on() -> None:
    run = run_of("diloco", {"name": f"{__name__}:Classes", "breaks": (1, 4)})
    group = [replica(run, worker) for worker in range(3)]
    losses = Together(group[0]).train(group, [0, 0, 0], 2)
    assert all(math.isfinite(group[worker].judged(0, losses[worker])[1]) for worker in (0, 2))
    with pytest.raises(Diverged, match="worker 1: the loss of local step 1 is nan"):
        group[1].judged(0, losses[1])


def test_a_run_that_diverges_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of({"name": "diloco", "period": 5}, {"name": f"{__name__}:Classes", "breaks": (1, 28)})
    monkeypatch.setattr(engine, "_together", forced)
    with pytest.raises(Diverged, match="worker 1: the loss of local step 7 is nan"):
        simulate(run)


def test_an_error_of_the_task_names_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of({"name": "diloco", "period": 5}, {"name": "test_engine:Breaks"})
    monkeypatch.setattr(engine, "_together", forced)
    with pytest.raises(TaskError, match="worker 2: the task raised at local step 2: ZeroDivisionError: of the user"):
        simulate(run)


def test_what_draws_or_keeps_statistics_is_done_one_by_one() -> None:
    run = run_of("diloco", {"name": "test_engine:Norms"})
    assert run.make_task() == Norms()
    assert not joined(lambda worker: replica(run, worker), 4)


def test_what_would_come_to_other_bits_is_done_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much quicker it is."""
    run = run_of("diloco", GPT)
    monkeypatch.setattr(together, "PAYS", math.inf)
    assert joined(lambda worker: replica(run, worker), 4)
    rounded = Together._gradients

    def otherwise(self: Together, stacked: Tensor, batches: Any) -> tuple[Tensor, Tensor]:
        grads, losses = rounded(self, stacked, batches)
        grads[-1, 0] += 1e-4
        return grads, losses

    monkeypatch.setattr(Together, "_gradients", otherwise)
    assert not joined(lambda worker: replica(run, worker), 4)


@pytest.mark.parametrize(
    ("fields", "tried"),
    [
        ({"steps": 10**6}, True),
        ({"steps": 20}, False),  # over before a trial would be
        ({"steps": 10**6, "fleet": {"workers": [{"count": 6}]}}, False),  # three for each process
        ({"steps": 10**6, "task": {**GPT, "width": 256}}, False),
    ],
    ids=["many small ones for long", "short", "few", "large"],
)
def test_a_trial_is_made_where_it_may_pay(fields: dict[str, Any], tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(engine, "joined", lambda make, count: asked.append(count))
    run = run_of("diloco", fields.pop("task", GPT), **fields)
    task = run.make_task()
    assert not engine._together(run, task, initial_model(task, 0), 2)
    assert asked == ([SIZES[-1]] if tried else [])
