"""Workers whose model is cut anew while they have it: who becomes which stage, what moves, and who is lost there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate, pairwise, permutations
from typing import Any

import pytest
import ray
import ray.exceptions
import safetensors.torch
import torch
from blocks import Chain, named
from hypothesis import given, settings
from hypothesis import strategies as st
from shelf import snapshot
from torch import Tensor

from decentral.checkpoint.contents import describe
from decentral.config import Run, validated
from decentral.errors import RunError
from decentral.pipeline import Assembly, Pipeline
from decentral.snapshot import Snapshot
from decentral.workers.crew import Crew, Parted, seats_for

LAYERS = 6
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes do not find tests


def run_of(stages: int, replicas: int = 1) -> Run:
    return validated(
        {
            "steps": 20,
            "batch_size": 4,
            "task": named(Chain, layers=LAYERS),
            "rule": {"name": "diloco", "period": 5},
            "fleet": {"workers": [{"count": stages * replicas}]},
            "pipeline": {"stages": stages, "microbatches": 2},
        },
        "test",
    )


def whole() -> Tensor:
    """Return the parameters of a whole model, all different."""
    (layout,) = Pipeline().layouts(Chain(layers=LAYERS), 0, 4)
    return torch.arange(layout.size, dtype=torch.float32)


def ends_of(run: Run) -> list[tuple[int, int]]:
    """Return the first element of each stage in the whole model, and the one behind its last."""
    sizes = [layout.size for layout in run.pipeline.layouts(Chain(layers=LAYERS), 0, 4)]
    return list(pairwise(accumulate(sizes, initial=0)))


def states(run: Run) -> dict[int, Snapshot]:
    """Return what each worker of the run has: its stage of `whole`, a thousand more in each replica."""
    layouts = run.pipeline.layouts(Chain(layers=LAYERS), 0, 4)
    held = {}
    for replica in range(run.replicas):
        parts = (whole() + 1000 * replica).split([layout.size for layout in layouts])
        for stage, part in enumerate(parts):
            held[run.pipeline.grid.worker(replica, stage)] = snapshot(8, params=part.clone())
    return held


class Holder:
    """An actor that has left with its state, as a worker has; it dies when it is asked `dies` for the first time."""

    def __init__(self, worker: int = -1, held: Snapshot | None = None, dies: str = "") -> None:
        self._worker, self._held, self._dies, self._gave = worker, held, dies, 0
        self._begins: Snapshot | None = None
        self._was = worker

    def placed(self) -> None:
        """Return: the actor is there."""

    def give(self, need: Assembly) -> bytes:
        self._die_at("give")
        assert self._held is not None
        parts = need.given_by(self._worker, self._held.tensors)
        self._gave += sum(part.numel() for part in parts.values())
        return safetensors.torch.save(parts)

    def anew(self, _table: dict[str, Any], worker: int, need: Assembly, *given: bytes) -> None:
        self._die_at("anew")
        parts = {} if self._held is None else need.given_by(self._worker, self._held.tensors)
        for each in given:
            assert not safetensors.torch.load(each).keys() & parts.keys()  # nothing comes that is there
            parts |= safetensors.torch.load(each)
        self._begins, self._worker = need.joined(parts), worker

    def told(self) -> tuple[int, int, Tensor]:
        """Return who the actor was, how many elements it gave away, and the parameters that it begins with."""
        assert self._begins is not None
        return self._was, self._gave, self._begins.tensors["params"]

    def _die_at(self, asked: str) -> None:
        if self._dies == asked:
            os._exit(1)


def crew_of(run: Run, staying: set[int], dying: Mapping[int, str]) -> tuple[Crew, dict[int, Any]]:
    held, actor = states(run), ray.remote(Holder).options(num_cpus=0, max_restarts=0)
    actors = {worker: actor.remote(worker, each, dying.get(worker, "")) for worker, each in held.items()}
    ray.get([actors[worker].placed.remote() for worker in actors])
    parted = Parted({worker: describe(worker, each) for worker, each in held.items()}, dict.fromkeys(held, 3))
    return Crew(run, parted, actors, staying), actors


def hired(_worker: int) -> Any:
    return ray.remote(Holder).options(num_cpus=0, max_restarts=0).remote()


@pytest.mark.usefixtures("ray_cluster")
def test_three_of_four_stages_take_over_the_fourth_and_what_they_have_stays() -> None:
    old, new = run_of(4), run_of(3)
    before, after = ends_of(old), ends_of(new)
    crew, actors = crew_of(old, staying={0, 2, 3}, dying={})
    found = crew.hand_over(new, hired)
    came = {worker: ray.get(actor.told.remote()) for worker, actor in found.items()}
    assert torch.cat([came[worker][2] for worker in sorted(came)]).equal(whole())
    assert [came[worker][0] for worker in sorted(came)] == [0, 2, 3]
    stayed = sum(
        len(range(max(before[was][0], start), min(before[was][1], stop)))
        for was, (start, stop) in zip((0, 2, 3), after, strict=True)
    )
    gone = len(range(*before[1]))  # what the one who is nobody any more gave, it cannot say
    moved = sum(gave for _, gave, _ in came.values()) + gone
    assert moved == whole().numel() - stayed < whole().numel() / 2
    with suppress(ray.exceptions.RayActorError):
        while True:  # until it is known that whoever is nobody any more has ended
            ray.get(actors[1].placed.remote())


@pytest.mark.usefixtures("ray_cluster")
def test_more_stages_are_given_to_newcomers_each_element_once() -> None:
    old, new = run_of(2, replicas=2), run_of(3, replicas=2)
    crew, _ = crew_of(old, staying={0, 1, 2, 3}, dying={})
    found = crew.hand_over(new, hired)
    came = {worker: ray.get(actor.told.remote()) for worker, actor in found.items()}
    for replica in range(2):
        parts = [came[worker][2] for worker in new.pipeline.grid.row(3 * replica)]
        assert torch.cat(parts).equal(whole() + 1000 * replica)
    newcomers = sum(part.numel() for was, _, part in came.values() if was < 0)
    moved = sum(gave for _, gave, _ in came.values())
    assert newcomers <= moved < 2 * newcomers  # and the rest has gone over the cuts that were shifted


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("victim", "asked"), [(1, "give"), (0, "anew")])
def test_who_is_lost_meanwhile_is_told_of_and_nobody_is_left(victim: int, asked: str) -> None:
    crew, actors = crew_of(run_of(3), staying={0, 1, 2}, dying={victim: asked})
    with pytest.raises(RunError, match="a worker was lost while the model was cut anew"):
        crew.hand_over(run_of(2), hired)
    crew.release()
    for actor in actors.values():
        with suppress(ray.exceptions.RayActorError):
            while True:  # until its death is known
                ray.get(actor.placed.remote())


@pytest.mark.parametrize(("lost", "moved"), [(0, 6), (1, 4), (2, 4), (3, 6)])
def test_of_twelve_equal_blocks_a_third_or_a_half_moves_when_four_stages_become_three(lost: int, moved: int) -> None:
    """Stages of three become stages of four: the lost three move, and what the shifted cuts leave on the other side."""
    sizes = {
        new: {old: len(range(max(4 * new, 3 * old), min(4 * new + 4, 3 * old + 3))) for old in range(4)}
        for new in range(3)
    }
    seats = seats_for(sizes, {0, 1, 2, 3} - {lost})
    assert 12 - sum(sizes[new][old] for new, old in seats.items()) == moved


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_seats_would_keep_more_in_place(data: st.DataObject) -> None:
    """Against all ways to seat them."""
    olds, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    sizes = {
        worker: {old: data.draw(st.integers(0, 9), label=f"{worker} {old}") for old in range(olds)}
        for worker in range(count)
    }
    seats = seats_for(sizes, range(olds))
    assert len(seats) == min(olds, count) == len(set(seats.values()))
    kept = sum(sizes[worker][old] for worker, old in seats.items())
    chairs = [*range(olds), *[None] * max(0, count - olds)]
    best = max(
        sum(sizes[worker][old] for worker, old in enumerate(order) if old is not None)
        for order in permutations(chairs, count)
    )
    assert kept == best
