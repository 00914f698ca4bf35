"""Where local work is computed changes no bit of what a simulation comes to."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from decentral.config import Run, validated
from decentral.errors import ConfigError, RunError, TaskError
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.sim.engine import Arena
from decentral.sim.engine.memory import ALIGNMENT_BYTES, BLOCK_BYTES
from decentral.sim.simulate import simulate
from decentral.task import Task
from decentral.tasks.quadratic import Quadratic

FLEET = {
    "workers": [{"count": 2}, {"count": 2, "speed": 0.5}],
    "jitter": 0.3,
    "events": [{"at_s": 0.4, "worker": 1}],
    "detection_s": 0.3,
}


class Norms(Task):
    """A small model with batch normalisation and dropout: statistics, counters and chance besides the parameters."""

    name: ClassVar[str] = "norms"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        return torch.randn(size, 4, generator=torch.Generator().manual_seed(1_000 * worker + start))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, self.batch(99, 0, 64)))}


class Dies(Quadratic):
    """A task that ends its process at a local step."""

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        if worker == 1 and start == 2 * size:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(worker, start, size)


class Breaks(Quadratic):
    """A task that raises at a local step of worker 2."""

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        if worker == 2 and start == 2 * size:
            raise ZeroDivisionError("of the user's own")
        return super().batch(worker, start, size)


class Meddler(SyncRule):
    """Changes its parameters while they train."""

    async def run(self, peer: Peer) -> None:
        training = peer.spawn(peer.train(5))
        await asyncio.sleep(0.01)
        peer.params.add_(1.0)
        await training


def make_run(rule: Any, processes: int | None, **options: Any) -> Run:
    """Return a short run whose local steps are computed by so many processes."""
    table = {"steps": 20, "batch_size": 4, "evaluate_every": 5, "task": {"name": "quadratic"}, "rule": rule}
    return validated({**table, "fleet": FLEET, "sim": {"processes": processes}, **options}, "test")


def bits(outcome: Outcome) -> tuple[list[str], dict[int, bytes], dict[tuple[int, str], bytes]]:
    """Return the journal, the parameters and the slots, byte for byte."""
    return (
        [record.to_json() for record in outcome.records],
        {worker: params.numpy().tobytes() for worker, params in outcome.params.items()},
        {
            (worker, name): slot.numpy().tobytes()
            for worker, slots in outcome.slots.items()
            for name, slot in slots.items()
        },
    )


@pytest.mark.parametrize(
    ("rule", "inner"),
    [
        ({"name": "diloco", "period": 5}, "adopt"),  # phases; the optimiser counts steps in a plain number
        ({"name": "noloco", "period": 5}, "adamw"),
        ({"name": "ddp"}, "muon"),  # gradients that come in buckets
        ({"name": "a2cid2", "period": 5}, "sgd"),  # meetings while training
        ({"name": "des_loc"}, "adamw"),  # changes the optimiser's state
        ({"name": "single_merge"}, "adamw"),  # estimates statistics anew
        ({"name": "just_one_byte", "samples": 4}, "sgd"),  # losses alone
        ({"name": "fedhyper", "period": 5, "adapts": "own"}, "adamw"),  # another learning rate for each step
        ({"name": "fedspeed", "period": 5}, "sgd"),  # two gradients of one batch
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_journal_and_parameters_do_not_depend_on_the_number_of_processes(rule: Any, inner: str) -> None:
    options: dict[str, Any] = {"inner": {"name": inner, "lr": 0.01}, "task": {"name": f"{__name__}:Norms"}}
    one, two, three = (bits(simulate(make_run(rule, count, **options))) for count in (1, 2, 3))
    assert one == two == three


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_task_raises_names_worker_and_step_in_any_process(processes: int) -> None:
    run = make_run("diloco", processes, task={"name": f"{__name__}:Breaks"})
    with pytest.raises(TaskError, match="worker 2: the task raised at local step 2: ZeroDivisionError: of the user"):
        simulate(run)


def test_process_that_dies_ends_the_simulation_with_its_exit_code() -> None:
    with pytest.raises(RunError, match=r"has died \(exit code -9\)"):
        simulate(make_run("diloco", 2, task={"name": f"{__name__}:Dies"}))


def test_change_of_parameters_in_training_is_found_out() -> None:
    with pytest.raises(RuntimeError, match="its parameters were changed"):
        simulate(make_run(Meddler(), 2))


def test_processes_need_one_thread_each() -> None:
    with pytest.raises(ConfigError, match=r"sim.processes: 2, but only 1 works .* with real.threads above 1"):
        simulate(make_run("diloco", 2, real={"threads": 2}))


@pytest.mark.parametrize(("asked", "there"), [(None, 0), (1, 0), (3, 3), (9, 4)])  # four workers keep four busy
def test_processes_are_those_asked_for_and_none_for_a_run_of_a_moment(asked: int | None, there: int) -> None:
    seen = set()
    simulate(make_run("diloco", asked), on_record=lambda record: seen.add(len(multiprocessing.active_children())))
    assert seen == {there}


def test_timing_alone_needs_no_processes() -> None:
    seen = set()
    run = make_run("diloco", 3)
    simulate(run, timing_only=True, on_record=lambda record: seen.add(len(multiprocessing.active_children())))
    assert seen == {0}


def test_no_process_is_left_behind() -> None:
    before = multiprocessing.active_children()
    simulate(make_run("diloco", 3))
    with pytest.raises(TaskError):
        simulate(make_run("diloco", 2, task={"name": f"{__name__}:Breaks"}))
    assert multiprocessing.active_children() == before


# Shared memory.


def test_arena_is_shared_with_a_forked_process() -> None:
    values = Arena().copy_of(torch.arange(5.0))
    child = multiprocessing.get_context("fork").Process(target=values.mul_, args=(2.0,))
    child.start()
    child.join()
    assert values.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_tensors_of_an_arena_are_zero_aligned_and_apart() -> None:
    arena = Arena()
    shapes = [(3,), (0,), (), (2, 5), (BLOCK_BYTES // 4 + 1,), (7,)]  # one is larger than a block
    tensors = [arena.zeros(shape) for shape in shapes] + [arena.zeros((3,), torch.int64)]
    assert [tuple(tensor.shape) for tensor in tensors] == [*shapes, (3,)]
    assert not any(bool(tensor.any()) for tensor in tensors)
    assert all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors)
    for index, tensor in enumerate(tensors, 1):
        tensor.fill_(index)
    for index, tensor in enumerate(tensors, 1):
        assert bool((tensor == index).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sim": {"device": "gpu"}}, "sim.device: 'gpu' cannot compute here: .*\"cpu\" can"),
        ({"sim": {"device": "meta"}}, "sim.device: 'meta' cannot compute here"),
        pytest.param(
            {"sim": {"device": "cuda"}},
            "sim.device: 'cuda' cannot compute here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(make_run("diloco", None, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_a_cpu_does() -> None:
    rule = {"name": "diloco", "period": 5}
    on_cpu, on_gpu = (simulate(make_run(rule, None, sim={"device": device})) for device in ("cpu", "cuda"))
    assert torch.allclose(on_gpu.merged(), on_cpu.merged(), atol=1e-5)
