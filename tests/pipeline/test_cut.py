"""Where a model is cut: against all possible cuts, and what cannot be cut says why."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from blocks import Chain, Forgetful, Noisy, Odd, TwoInputs, Unsaid
from torch import nn

from decentral.errors import ConfigError, TaskError
from decentral.pipeline import Cut, cut_of, survey
from decentral.replica import initial_model
from decentral.task import Task
from decentral.tasks import ByteGPT, LayerStack

SEED = 3


class Uneven(Chain):
    """A chain whose layers become wider and narrower."""

    def model(self) -> nn.Module:
        widths = [8, 64, 16, 4, 32, 8, 8]
        layers = [(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(widths)]
        return nn.Sequential(*[module for pair in layers for module in pair])


def cut(task: Task, stages: int, cuts: tuple[int, ...] | None = None) -> Cut:
    return cut_of(task, SEED, 4, stages, cuts)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_the_slowest_stage_is_as_fast_as_any_cut_makes_it(stages: int) -> None:
    found = cut(Uneven(), stages)
    costs = [block.cost for block in found.blocks]
    able = [
        max(sum(costs[start:stop]) for start, stop in pairwise((0, *chosen, len(costs))))
        for chosen in combinations(range(1, len(costs)), stages - 1)
        if all(
            any(block.parameters for block in found.blocks[start:stop])
            for start, stop in pairwise((0, *chosen, len(costs)))
        )
    ]
    assert max(sum(costs[index] for index in found.of(stage)) for stage in range(stages)) == min(able)
    assert sum(found.share(found.of(stage)) for stage in range(stages)) == pytest.approx(1)


def test_a_block_costs_its_products_and_what_comes_out() -> None:
    with torch.device("meta"):
        blocks = survey(Chain(width=8, layers=1), initial_model(Chain(width=8, layers=1), SEED), 4)
    assert [(block.parameters, block.cost, block.shape) for block in blocks] == [
        (8 * 8 + 8, 2 * 4 * 8 * 8 + 4 * 8, (4, 8)),
        (0, 4 * 8, (4, 8)),
    ]


def test_it_is_known_which_blocks_draw() -> None:
    assert [block.draws for block in cut(Noisy(layers=4), 2).blocks] == [False] * 5 + [True] + [False] * 5 + [True]


@pytest.mark.parametrize(
    "task",
    [Chain(), LayerStack(layers=5), ByteGPT(width=16, depth=3, heads=2, context=16)],
    ids=lambda task: type(task).__name__,
)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages_one_after_the_other_are_the_model_bit_for_bit(task: Task, stages: int) -> None:
    found, model = cut(task, stages), initial_model(task, SEED)
    parts = [found.part(task, model, found.of(stage)) for stage in range(stages)]
    batch = task.batch(0, 0, 4)

    class Stages(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            for stage, part in enumerate(parts):
                (run,) = found.held[stage]
                values = part(values, run)
                assert tuple(values.shape) == found.shape(run.stop) or stage == stages - 1
            return values

    assert task.loss(Stages(), batch).equal(task.loss(model, batch))
    flat = [torch.cat([values.detach().flatten() for values in part.parameters()]) for part in parts]
    assert found.assemble(flat).equal(torch.cat([values.detach().flatten() for values in model.parameters()]))


def test_cuts_may_be_given() -> None:
    assert cut(Chain(layers=4), 3, (1, 6)).held == ((range(1),), (range(1, 6),), (range(6, 8),))


@pytest.mark.parametrize(
    ("task", "stages", "cuts", "message"),
    [
        (Chain(layers=3), 4, None, "4, but the model has only 3 blocks with parameters"),
        (Chain(layers=2), 2, (3,), "stage 1 is the blocks 3 to 3 of 4, in which there are no parameters"),
        (Chain(layers=2), 2, (9,), "stage 1 is the blocks 9 to 3 of 4"),
    ],
)
def test_stages_that_the_model_has_not_are_refused(
    task: Task, stages: int, cuts: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(task, stages, cuts)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Odd(what="pair"), "block 2 of the model, Pair, returns a tuple"),
        (
            Odd(what="tied"),
            "parameter '0.(weight|bias)' is used in the stages 0 and 1; tied weights must lie in one stage",
        ),
        (Odd(what="norm"), "module '2' normalises over a batch"),
        (Unsaid(), "task.model\\(\\) is a Loner, and a pipeline cuts a sequence of blocks"),
        (Forgetful(), "parameter 'scale' of the model is in no block"),
        (TwoInputs(), "task.loss\\(\\) calls the model on something else than one tensor"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Task) else None,
)
def test_a_model_that_cannot_be_cut_says_why(task: Task, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        cut(task, 2)


def test_weights_tied_within_a_stage_are_cut() -> None:
    task = Odd(what="tied")
    assert [cut(task, 2, (4,)).of(stage) for stage in (0, 1)] == [[0, 1, 2, 3], [4]]
