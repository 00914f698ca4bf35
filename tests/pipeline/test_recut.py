"""Which elements of old stages make the new ones: every parameter once, whatever the cuts."""

from __future__ import annotations

import random
from contextlib import suppress
from itertools import combinations

import pytest
import torch
from blocks import Chain, TiedEnds
from torch import Tensor

from decentral.checkpoint import Description
from decentral.checkpoint.contents import describe
from decentral.errors import ConfigError
from decentral.pipeline import OldStages, Pipeline, moves
from decentral.snapshot import Life, Snapshot
from decentral.state import Layout
from decentral.task import Task
from decentral.tasks import ByteGPT

GPT = ByteGPT(width=16, depth=5, heads=2, context=16)
TASKS: dict[str, tuple[Task, int, str]] = {  # with the blocks behind which it may be cut, and where its head is
    "chain": (Chain(layers=6), 12, "last"),
    "gpt": (GPT, 7, "last"),
    "gpt, head first": (GPT, 6, "first"),
    "tied ends": (TiedEnds(layers=4), 8, "first"),
}


def some_cuts(name: str) -> list[tuple[Layout, ...]]:
    """Return the layouts of the uncut model and of two random cuts into each of two, three and four stages."""
    task, stop, head = TASKS[name]
    chance, found = random.Random(0), {1: [Pipeline().layouts(task, 0, 4)]}
    able = [cuts for stages in (2, 3, 4) for cuts in combinations(range(1, stop), stages - 1)]
    for cuts in chance.sample(able, len(able)):
        same = found.setdefault(len(cuts) + 1, [])
        if len(same) < 2:
            with suppress(ConfigError):  # a stage without parameters
                pipeline = Pipeline(stages=len(cuts) + 1, cuts=cuts, head=head)  # type: ignore[arg-type]
                same.append(pipeline.layouts(task, 0, 4))
    return [cut for same in found.values() for cut in same]


def whole(layouts: tuple[Layout, ...], vectors: list[Tensor]) -> dict[str, Tensor]:
    """Return the parameters of all stages by name."""
    return {
        entry.name: vector[entry.start : entry.stop]
        for layout, vector in zip(layouts, vectors, strict=True)
        for entry in layout.entries
    }


@pytest.mark.parametrize("name", TASKS)
def test_every_element_goes_to_one_place_under_its_name(name: str) -> None:
    cuts = some_cuts(name)
    assert {len(cut) for cut in cuts} == {1, 2, 3, 4}
    for old in cuts:
        sizes = [layout.size for layout in old]
        vectors = list(torch.arange(sum(sizes)).split(sizes))
        for new in cuts:
            made, taken = [], [torch.zeros(layout.size) for layout in old]
            for layout in new:
                place, parts = 0, []
                for stage, start, stop, to in moves(old, layout):
                    assert to == place
                    place += stop - start
                    parts.append(vectors[stage][start:stop])
                    taken[stage][start:stop] += 1
                assert place == layout.size
                made.append(torch.cat(parts))
            assert all(bool((times == 1).all()) for times in taken)
            before, after = whole(old, vectors), whole(new, made)
            assert before.keys() == after.keys()
            assert all(before[each].equal(after[each]) for each in before)


def test_neighbours_move_together() -> None:
    """A stage that is part of an old one is one move, and one that holds parts of two is two."""
    old = Pipeline(stages=2, cuts=(4,)).layouts(Chain(layers=4), 0, 4)
    new = Pipeline(stages=4).layouts(Chain(layers=4), 0, 4)
    made = [[(move.stage, move.to) for move in moves(old, layout)] for layout in new]
    assert made == [[(0, 0)], [(0, 0)], [(1, 0)], [(1, 0)]]
    (uncut,) = Pipeline().layouts(Chain(layers=4), 0, 4)
    assert [(move.stage, move.to) for move in moves(old, uncut)] == [(0, 0), (1, old[0].size)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Chain(layers=5), "'8.weight' of shape .* is not in it"),
        (Chain(width=4), r"'0.weight' .* of shape \(8, 8\) there"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(other: Task, message: str) -> None:
    old = Pipeline(stages=2).layouts(Chain(), 0, 4)
    with pytest.raises(ConfigError, match=message):
        [moves(old, layout) for layout in Pipeline().layouts(other, 0, 4)]


def described(worker: int, **tensors: Tensor) -> Description:
    life = Life(1.0, 4, 3, 1, 0, False, (), {"compute": 1.0}, 0, 0, 0)
    return describe(worker, Snapshot(1, {"sync": 1}, tensors, life))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"slot mass": torch.ones(1)}, r"worker 0 keeps 'mass' of shape \(1,\), which has no element for each"),
        ({"slot anchor": torch.ones(144)}, "only 1 of 2 workers keep 'anchor'"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(tensors: dict[str, Tensor], message: str) -> None:
    layouts = Pipeline(stages=2).layouts(Chain(), 0, 4)
    params = torch.zeros(144)
    assert [layout.size for layout in layouts] == [144, 144]
    workers = {0: described(0, params=params, **tensors), 1: described(1, params=params)}
    with pytest.raises(ConfigError, match=f"stages cannot be cut anew, for {message}.*go on with the stages"):
        OldStages(layouts, workers).vectors()


def test_what_is_learnt_anew_is_not_kept() -> None:
    layouts = Pipeline(stages=2).layouts(Chain(), 0, 4)
    tensors = {"params": torch.zeros(144), "slot sync.0.norms": torch.ones(16), "inner exp_avg": torch.zeros(144)}
    workers = {worker: described(worker, **tensors) for worker in range(2)}
    assert OldStages(layouts, workers).vectors() == ["params", "inner exp_avg"]
