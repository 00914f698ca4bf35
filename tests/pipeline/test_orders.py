"""In which order workers go through microbatches: what must hold on any paths, and what each order promises."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from blocks import Chain

from decentral.fleet import Fleet, WorkerGroup
from decentral.pipeline import (
    ORDERS,
    Action,
    Cut,
    Ground,
    Path,
    Paths,
    Permuted,
    Straight,
    Swapped,
    cut_of,
    timetable,
)
from decentral.protocols.codecs import Float32
from decentral.tasks import ByteGPT

SHAPES = [(stages, microbatches) for stages in (1, 2, 3, 5) for microbatches in (1, 2, 4, 7)]
GPT = cut_of(ByteGPT(width=16, depth=8, heads=2, context=16), 0, 4, 4, alike=True)
WOUND = [(Swapped(), 1), (Permuted(), 3)]


def chain(stages: int) -> Cut:
    return cut_of(Chain(layers=stages), 0, 4, stages, tuple(range(2, 2 * stages, 2)))


def plan(
    paths: Paths, cut: Cut, microbatches: int, order: str, replicas: int = 1
) -> tuple[tuple[Path, ...], dict[int, list[Action]]]:
    found = timetable(paths, ground(cut, microbatches, replicas), 0, order)
    return found.paths, {worker: list(actions) for worker, actions in found.actions.items()}


def ground(cut: Cut, microbatches: int, replicas: int = 1, seed: int = 0) -> Ground:
    fleet = Fleet(workers=(WorkerGroup(count=cut.stages * replicas),))
    return Ground(cut, tuple(range(replicas)), microbatches, Float32(), seed, fleet)


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    """Return the order of PipeDream-Flush: forward until the first gradient can be there, then by turns."""
    ahead = min(stages - stage - 1, microbatches)
    actions = [("forward", index) for index in range(ahead)]
    for index in range(microbatches - ahead):
        actions += [("forward", ahead + index), ("backward", index)]
    return actions + [("backward", index) for index in range(microbatches - ahead, microbatches)]


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_through_equal_stages_1f1b_is_that_of_the_paper_and_gpipe_forward_then_back(
    stages: int, microbatches: int
) -> None:
    _, by_turns = plan(Straight(), chain(stages), microbatches, "1f1b")
    _, in_turn = plan(Straight(), chain(stages), microbatches, "gpipe")
    for stage in range(stages):
        said = [(action.kind, action.path) for action in by_turns[stage]]
        assert said == one_forward_one_backward(stage, stages, microbatches)
        said = [(action.kind, action.path) for action in in_turn[stage]]
        assert said == [(kind, index) for kind in ("forward", "backward") for index in range(microbatches)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("paths", "replicas"), [(Straight(), 1), *WOUND])
@pytest.mark.parametrize("microbatches", [2, 3, 8])
def test_nobody_waits_in_a_circle_and_all_is_done_once(
    paths: Any, replicas: int, microbatches: int, order: str
) -> None:
    """Every worker does its next action as soon as what it needs is there; in the end all have done all."""
    ways, actions = plan(paths, GPT, microbatches, order, replicas)
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for left in actions.values():
            if not left:
                continue
            kind, path, place = left[0]
            last = len(ways[path].hops) - 1
            if kind == "forward":
                needs = Action("forward", path, place - 1) if place else None
            else:
                needs = Action("backward", path, place + 1) if place < last else Action("forward", path, last)
            if needs is None or needs in done:
                assert left[0] not in done
                done.add(left.pop(0))
                moved = True
    assert not any(actions.values())
    assert len(done) == 2 * sum(len(way.hops) for way in ways)


@pytest.mark.parametrize("microbatches", [2, 3, 8])
def test_every_second_microbatch_is_swapped_and_goes_through_every_block_once(microbatches: int) -> None:
    ways = Swapped().ways(ground(GPT, microbatches), 0)
    orders = [[hop.worker for hop in way.hops] for way in ways]
    assert orders[0] == [0, 1, 2, 3]
    assert orders[1] == [0, 1, 0, 3, 2, 3]  # embedding, 1, 0, 3, 2, head
    assert sum(order != orders[0] for order in orders) == microbatches // 2
    for way in ways:
        assert sorted(block for hop in way.hops for block in hop.blocks) == list(range(10))
    six = Swapped().ways(ground(chain(6), 2), 0)[1]
    assert [hop.worker for hop in six.hops] == [1, 0, 2, 3, 5, 4]


def test_permuted_microbatches_reach_every_worker_equally_and_keep_their_blocks_in_order() -> None:
    replicas, microbatches = 5, 3
    over = ground(GPT, microbatches, replicas, seed=7)
    for draw in range(10):
        ways = Permuted().ways(over, draw)
        assert ways == Permuted().ways(over, draw)
        visits = Counter((hop.worker, way.microbatch) for way in ways for hop in way.hops)
        assert visits == Counter(
            {(worker, index): 1 for worker in range(4 * replicas) for index in range(microbatches)}
        )
        for way in ways:
            assert way.hops[0].worker == 4 * way.replica
            assert [hop.worker % 4 for hop in way.hops] == [0, 1, 2, 3]
            assert all(before.stop == after.start for before, after in pairwise(way.hops))
    everywhere = {Permuted().ways(over, draw)[0].hops[-1].worker for draw in range(60)}
    assert len(everywhere) == replicas
    assert Permuted().draws(3) != Permuted().draws(4)
    assert Straight().draws(3) == Straight().draws(4)
