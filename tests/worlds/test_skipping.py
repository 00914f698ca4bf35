"""Pipelines whose microbatches leave out stages: what they do on a real grid, against what the plan foresees."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from blocks import Chain, named
from sockets import train_here
from test_same_rule import assert_same_replicas

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.fleet import Fleet, WorkerGroup
from decentral.pipeline import Ground, Path, placed
from decentral.sim.simulate import simulate

STAGES, VISITS, REPLICAS, MICROBATCHES = 6, 4, 3, 5
FAR = [{"count": 1, "site": f"site {index}"} for index in (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2)]
LINKS = [
    {"source": "site 0", "to": "site 1", "bps": 2e4, "latency_s": 0.05},
    {"source": "site 0", "to": "site 2", "bps": 1e4, "latency_s": 0.1},
    {"source": "site 1", "to": "site 2", "bps": 4e4, "latency_s": 0.02},
]


def run_of(paths: Any = None, **fields: Any) -> Run:
    fleet = {"workers": FAR, "network": {"links": LINKS}, "step_time_s": 1.0, **fields.pop("fleet", {})}
    return validated(
        {
            "steps": 20,
            "batch_size": 10,
            "evaluate_every": 0,
            "task": named(Chain, width=8, layers=STAGES),
            "rule": {"name": "local_sgd", "period": 5},
            "inner": {"name": "adamw", "lr": 3e-3},
            "pipeline": {
                "stages": STAGES,
                "microbatches": MICROBATCHES,
                "head": "first",
                "cuts": tuple(range(2, 2 * STAGES, 2)),
                **({} if paths is None else {"paths": paths}),
                **fields.pop("pipeline", {}),
            },
            "fleet": fleet,
            **fields,
        },
        "test",
    )


def ways(run: Run, paths: Any) -> list[Path]:
    cut = run.pipeline.cut(run.make_task(), run.seed, run.batch_size)
    ground = Ground(cut, tuple(range(REPLICAS)), MICROBATCHES, run.pipeline.codec, run.seed, run.fleet)
    return run_of(paths).pipeline.ways.ways(ground, 0)


@pytest.mark.parametrize("plan", ["costs", "random"])
def test_stages_are_visited_equally_often_and_the_first_always(plan: str) -> None:
    found = ways(run_of(), {"name": "skip", "visits": VISITS, "plan": plan})
    assert len(found) == REPLICAS * MICROBATCHES
    visits = Counter(hop.worker for path in found for hop in path.hops[:-1])  # the last is the head's
    for path in found:
        stages = [hop.worker % STAGES for hop in path.hops[:-1]]
        assert len(stages) == len(set(stages)) == VISITS
        assert path.hops[0].worker == path.replica * STAGES
        assert path.hops[-1].worker == path.hops[0].worker
    assert max(visits.values()) <= MICROBATCHES
    for stage in range(STAGES):
        share = (VISITS - 1) / (STAGES - 1) if stage else 1
        assert sum(visits[worker] for worker in range(stage, 18, STAGES)) == share * len(found)


def test_an_iteration_is_shorter_when_stages_are_skipped_and_shortest_when_paths_are_planned() -> None:
    """Times alone; the fleet's sites are far apart, and its workers lie anyhow."""

    def seconds(paths: Any) -> float:
        return simulate(run_of(paths), timing_only=True).seconds

    full, random, planned = (
        seconds(paths)
        for paths in (
            None,
            {"name": "skip", "visits": VISITS, "plan": "random"},
            {"name": "skip", "visits": VISITS},
        )
    )
    assert planned < 0.8 * random
    assert planned < 0.5 * full


def test_a_placement_puts_stages_near_each_other() -> None:
    run = run_of()
    near = run.model_copy(update={"fleet": placed(run.fleet, STAGES, 100)})
    assert Counter(near.fleet.sites()) == Counter(run.fleet.sites())
    assert simulate(near, timing_only=True).seconds < 0.6 * simulate(run, timing_only=True).seconds
    with pytest.raises(ConfigError, match="4 workers make a replica, and the fleet has 3"):
        placed(Fleet(workers=(WorkerGroup(count=3),)), 4, 100)


@pytest.mark.slow
def test_a_model_learns_though_every_microbatch_leaves_stages_out() -> None:
    """The whole of it, too: two of six layers are left out of each batch, as in stochastic depth."""
    task = {"name": "byte_gpt", "width": 16, "depth": STAGES, "heads": 2, "context": 16, "eval_windows": 8}
    fields = {"steps": 30, "rule": {"name": "ddp"}, "task": task, "pipeline": {"cuts": (2, 3, 4, 5, 6)}}
    outcome = simulate(run_of({"name": "skip", "visits": VISITS}, **fields))
    assert outcome.after["loss"] == pytest.approx(simulate(run_of(**fields)).after["loss"], rel=0.02)
    assert outcome.after["loss"] < 0.75 * outcome.before["loss"]
    for stage in range(STAGES):
        assert all(outcome.params[stage].equal(outcome.params[stage + STAGES * replica]) for replica in range(REPLICAS))


def test_both_worlds_skip_the_same_stages() -> None:
    fields = {"fleet": {"workers": [{"count": 6}], "network": {}}, "batch_size": 6, "task": named(Chain, layers=3)}
    pipeline = {"stages": 3, "microbatches": 2, "cuts": (2, 4)}
    run = run_of({"name": "skip", "visits": 2}, pipeline=pipeline, **fields)
    assert_same_replicas(train_here(run), simulate(run))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"paths": {"name": "skip", "visits": 7}}, "pipeline.paths.visits: 7, but there are 6 stages"),
        ({"paths": {"name": "skip", "visits": 4}, "head": "last"}, 'for the loss; set pipeline.head = "first"'),
    ],
)
def test_what_cannot_be_skipped_is_refused(pipeline: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(pipeline=pipeline)


def test_too_little_memory_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"pipeline\.paths: slots: each node of stage 0 starts 5 microbatches and has memory for 2"
    ):
        simulate(run_of({"name": "skip", "visits": VISITS, "memory": 2}), timing_only=True)
