"""In which order a stage goes through microbatches: what must hold of any order, and what each promises."""

from __future__ import annotations

import pytest

from decentral.pipeline import ORDERS, Action

SHAPES = [(stages, microbatches) for stages in (1, 2, 3, 5) for microbatches in (1, 2, 4, 7)]


def under_way(actions: list[Action]) -> int:
    """Return how many microbatches a stage remembers, at the most."""
    held = most = 0
    for action in actions:
        held += 1 if action.kind == "forward" else -1
        most = max(most, held)
    return most


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_every_microbatch_goes_forward_and_then_back_in_ascending_order(
    order: str, stages: int, microbatches: int
) -> None:
    for stage in range(stages):
        actions = ORDERS[order](stage, stages, microbatches)
        for kind in ("forward", "backward"):
            assert [action.microbatch for action in actions if action.kind == kind] == list(range(microbatches))
        for microbatch in range(microbatches):
            assert actions.index(Action("forward", microbatch)) < actions.index(Action("backward", microbatch))


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_1f1b_remembers_no_more_than_there_are_stages_behind_and_gpipe_all(stages: int, microbatches: int) -> None:
    for stage in range(stages):
        assert under_way(ORDERS["1f1b"](stage, stages, microbatches)) == min(stages - stage, microbatches)
        assert under_way(ORDERS["gpipe"](stage, stages, microbatches)) == microbatches


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_stages_never_wait_for_one_another_in_a_circle(order: str, stages: int, microbatches: int) -> None:
    """Every stage does its next action as soon as what it needs is there; in the end all have done all."""
    left = [ORDERS[order](stage, stages, microbatches) for stage in range(stages)]
    done: set[tuple[int, Action]] = set()
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(left):
            if actions:
                kind = actions[0].kind
                needs = stage - 1 if kind == "forward" else stage + 1
                if not 0 <= needs < stages or (needs, actions[0]) in done:
                    done.add((stage, actions.pop(0)))
                    moved = True
    assert not any(left)
