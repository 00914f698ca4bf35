"""With how many stages a run goes on, by the workers for whom there are places."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from blocks import Chain, named

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.workers.places import PATIENCES, Shortage

PATIENCE_S = 10.0
LONG_S = PATIENCES * PATIENCE_S


def run_of(replicas: int = 1, **fields: Any) -> Run:
    return validated(
        {
            "steps": 20,
            "batch_size": 4,
            "patience_s": PATIENCE_S,
            "task": named(Chain, layers=6),
            "rule": {"name": "diloco", "period": 5},
            "inner": {"name": "adamw", "lr": 1e-3},
            "fleet": {"workers": [{"count": 4 * replicas}]},
            "checkpoint": {"url": "memory://places"},
            **fields,
            "pipeline": {"stages": 4, "least": 2, "microbatches": 2} | fields.get("pipeline", {}),
        },
        "test",
    )


@pytest.mark.parametrize(
    ("replicas", "placed", "stages"),
    [
        (1, range(4), None),
        (1, (0, 1, 3), 3),
        (1, (2, 3), 2),
        (1, (2,), None),  # too few: they are waited for
        (2, range(4), None),  # one row is whole
        (2, (0, 1, 2, 4, 5, 6), 3),
        (2, (0, 1, 2, 4, 5), 2),
        (2, (0, 1, 4), None),
    ],
)
def test_each_replica_has_as_many_stages_as_there_are_places(
    replicas: int, placed: Collection[int], stages: int | None
) -> None:
    shortage = Shortage(run_of(replicas))
    assert shortage.stages(placed) == stages
    assert shortage.lasting(range(4 * replicas), 5.0) is None
    assert shortage.lasting(placed, 5.0 + LONG_S) is None
    assert shortage.lasting(placed, 5.1 + LONG_S) == stages


def test_a_place_that_comes_in_time_is_no_reason() -> None:
    shortage = Shortage(run_of())
    for now_s in (0.0, LONG_S, 2 * LONG_S):
        assert shortage.lasting((0, 1, 2), now_s) is None
        assert shortage.lasting(range(4), now_s + 1) is None
    assert shortage.lasting((0, 1, 2), 4 * LONG_S) == 3


def test_whoever_has_not_said_so_is_never_cut_anew() -> None:
    assert Shortage(run_of(pipeline={"least": None})).stages((0, 1, 2)) is None


def test_a_run_with_fewer_stages_is_a_run_with_fewer_workers_and_the_same_replicas() -> None:
    run = run_of(
        2,
        pipeline={"cuts": [2, 4, 6]},
        fleet={"workers": [{"count": 3, "speed": 0.5}, {"count": 5}]},
        real={"min_workers": 7},
    )
    fewer = run.with_stages(3)
    assert [(group.count, group.speed) for group in fewer.fleet.workers] == [(3, 0.5), (3, 1.0)]
    assert (fewer.replicas, fewer.pipeline.cuts, fewer.real.min_workers) == (2, None, 6)
    assert validated(fewer.to_table(), "test").to_table() == fewer.to_table()  # as each worker reads it
    assert run.with_stages(4) == run
    whole = run.with_stages(1).pipeline
    assert (whole.stages, whole.microbatches) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pipeline": {"least": 5}}, "pipeline.least: 5, but pipeline.stages is 4"),
        ({"checkpoint": {}}, "pipeline.least: a model is cut anew at a checkpoint; set checkpoint.url"),
        (
            {"pipeline": {"recovery": "checkfree_plus"}},
            "pipeline.least: with 2 stages: pipeline.paths: 'swapped' swaps two pairs of stages",
        ),
        ({"rule": {"name": "savic", "period": 5, "alpha": 0.5}}, "under rule 'savic' workers remember whether"),
        (
            {"rule": {"name": "ddp", "all_reduce": "gather", "codec": "powersgd"}},
            "rule.codec: what 'powersgd' remembers cannot be cut anew",
        ),
        (
            {"rule": {"name": "streaming_diloco", "codec": {"name": "error_feedback", "codec": "int8"}}},
            "rule.codec: what 'error_feedback' remembers cannot be cut anew",
        ),
    ],
)
def test_what_cannot_be_cut_anew_is_refused_when_the_run_file_is_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(**fields)


def test_a_rule_that_gossips_within_the_usual_distance_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule.clip: with 'auto' .* stages cannot be cut anew"):
        run_of(2, rule={"name": "gossip", "period": 5, "clip": "auto"})
