"""What a lost stage begins with: the paper's formula in closed form, and which blocks are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import Chain
from torch import Tensor

from decentral.errors import PeerGone
from decentral.inner import AdamW
from decentral.pipeline import (
    CheckFree,
    CheckFreePlus,
    Copy,
    Cut,
    Neighbour,
    Recovery,
    Redundant,
    TorchStage,
    cut_of,
)
from decentral.tasks import ByteGPT

STAGES = 4
GPT = ByteGPT(width=16, depth=8, heads=2, context=16)


def chain() -> Cut:
    return cut_of(Chain(layers=8), 0, 4, STAGES, (4, 8, 12))


def neighbours(cut: Cut, before: Tensor | float, behind: Tensor | float, norms: tuple[float, float]) -> list[Neighbour]:
    sides = zip((0, 2), (before, behind), norms, strict=True)
    return [Neighbour(stage, torch.zeros(cut.layouts[stage].size) + values, norm) for stage, values, norm in sides]


def rebuilt_by(recovery: Recovery, cut: Cut, beside: list[Neighbour]) -> Tensor:
    """Return what stage 1 begins with."""
    params = torch.full((cut.layouts[1].size,), float("nan"))
    recovery.rebuild(params, cut, 1, beside, ())
    return params


@pytest.mark.parametrize(
    ("fields", "norms", "expected"),
    [
        ({"epsilon": 0.0}, (2.0, 1.0), 2.0),
        ({"epsilon": 0.0, "exponent": 2.0}, (2.0, 1.0), 1.6),
        ({"epsilon": 0.0}, (0.0, 1.0), 4.0),
        ({"epsilon": 1e-4}, (0.0, 0.0), 2.5),
        ({"epsilon": 0.0}, (0.0, 0.0), 2.5),
        ({"exponent": 0.0}, (2.0, 1.0), 2.5),
    ],
)
def test_the_toy_stage_of_the_formula(fields: dict[str, float], norms: tuple[float, float], expected: float) -> None:
    cut = chain()
    rebuilt = rebuilt_by(CheckFree(**fields), cut, neighbours(cut, 1.0, 4.0, norms))
    assert torch.allclose(rebuilt, torch.full_like(rebuilt, expected))
    if not fields.get("epsilon", 1e-4):
        scaled = rebuilt_by(CheckFree(**fields), cut, neighbours(cut, 1.0, 4.0, (3 * norms[0], 3 * norms[1])))
        assert torch.allclose(scaled, rebuilt)


@pytest.mark.parametrize("recovery", [CheckFree(), CheckFree(exponent=2), Copy()])
def test_what_is_rebuilt_lies_between_the_neighbours(recovery: Any) -> None:
    cut, chance = chain(), torch.Generator().manual_seed(0)
    size = cut.layouts[1].size
    before, behind = torch.randn(size, generator=chance), torch.randn(size, generator=chance)
    rebuilt = rebuilt_by(recovery, cut, neighbours(cut, before, behind, (0.3, 0.7)))
    low, high = torch.minimum(before, behind), torch.maximum(before, behind)
    assert bool((rebuilt >= low - 1e-6).all())
    assert bool((rebuilt <= high + 1e-6).all())
    same = rebuilt_by(recovery, cut, neighbours(cut, before, before, (0.3, 0.7)))
    assert torch.allclose(same, before)


def test_a_copy_is_of_the_stage_before_or_of_the_one_behind() -> None:
    cut = chain()
    both = neighbours(cut, 1.0, 4.0, (1.0, 1.0))
    assert bool((rebuilt_by(Copy(), cut, both) == 1).all())
    assert bool((rebuilt_by(Copy(), cut, both[1:]) == 4).all())


def test_whose_parameters_are_needed() -> None:
    recovery, cut = CheckFree(), chain()
    assert recovery.sources(cut, 1, [0, 2, 3]) == (0, 2)
    assert recovery.sources(cut, 3, [0, 1, 2]) == (2,)
    assert recovery.sources(cut, 1, [0, 3]) == (0,)
    with pytest.raises(PeerGone, match="stage 1 of its replica is lost and so are those beside it"):
        recovery.sources(cut, 1, [3])


def test_mirrors_take_each_others_place_and_those_between_are_averaged() -> None:
    recovery, cut = CheckFreePlus(), cut_of(Chain(layers=6), 0, 4, 6)
    others = [[other for other in range(6) if other != stage] for stage in range(6)]
    assert [recovery.sources(cut, stage, others[stage]) for stage in range(6)] == [
        (1,),
        (0,),
        (1, 3),
        (2, 4),
        (5,),
        (4,),
    ]
    assert recovery.sources(cut, 1, [2, 3, 4, 5]) == (2,)  # its mirror is lost too
    assert recovery.follows(cut) == []  # there is nothing outside of the trunk


def test_embedding_and_head_are_kept_beside() -> None:
    cut = cut_of(GPT, 0, 4, 4, alike=True)
    assert [cut.of(stage) for stage in range(4)] == [[0, 1, 2], [3, 4], [5, 6], [7, 8, 9]]
    assert CheckFreePlus().follows(cut) == [(1, 0, (0,)), (2, 3, (9,))]
    assert CheckFreePlus().sources(cut, 0, [1, 2, 3]) == (1,)
    assert [follows[:2] for follows in Redundant().follows(cut)] == [(3, 0), (0, 1), (1, 2), (2, 3)]


def test_blocks_are_matched_with_their_like_though_a_stage_has_others_besides() -> None:
    """The first stage of a GPT has the embedding too, the last one the head: their transformer blocks count."""
    cut = cut_of(GPT, 0, 4, 4, (3, 5, 7))
    first, second = cut.layouts[0].entries, cut.layouts[1].entries
    embedding = first[0].stop
    block = (cut.layouts[1].size) // 2
    assert [cut.counterpart(index, 1, 0) for index in (3, 4)] == [embedding, embedding + block]
    assert [entry.shape for entry in first[1:]] == [entry.shape for entry in second]
    with pytest.raises(PeerGone, match="no stage beside it has a block like block 0; go on from a checkpoint"):
        CheckFree().sources(cut, 0, [1, 2, 3])


def test_of_more_blocks_than_the_neighbour_has_the_first_is_like_its_first_and_the_last_like_its_last() -> None:
    cut = cut_of(Chain(layers=8), 0, 4, 3, (8, 12))  # of four layers, two and two
    layer = cut.layouts[1].size // 2
    assert [cut.counterpart(block, 0, 1) for block in (0, 2, 4, 6)] == [0, 0, layer, layer]


def test_the_first_step_of_a_rebuilt_stage_is_that_of_a_fresh_optimiser_at_a_higher_rate() -> None:
    """Adam's first step moves every coordinate by its learning rate; losing the stage twice does not compound it."""
    lr = 1e-3
    cut = chain()
    stage = TorchStage(
        Chain(layers=8),
        AdamW(lr=lr, weight_decay=0.0, eps=1e-12),
        cut,
        worker=1,
        seed=0,
        batch_size=4,
        microbatches=1,
        total_steps=100,
    )
    for again in range(3):
        stage.begin_anew(CheckFree(), neighbours(cut, 1.0, 4.0, (1.0, 1.0)), None)
        for _ in range(again):  # whatever it has learned since is forgotten with it
            stage.grads.normal_(generator=torch.Generator().manual_seed(again))
            stage.update(again, 1.0)
        stage.begin_anew(CheckFree(), neighbours(cut, 1.0, 4.0, (1.0, 1.0)), None)
        before = stage.params.clone()
        stage.grads.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
        stage.update(again, 1.0)
        assert torch.allclose(before - stage.params, torch.full_like(before, 1.1 * lr), rtol=1e-3)
