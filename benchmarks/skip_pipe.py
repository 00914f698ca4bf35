"""What skipping a third of a pipeline's stages saves in an iteration, and what a model that has learned so is worth.

Run from the repository's root (about five minutes):

    python -m benchmarks.skip_pipe [draws]

Times: three replicas of a GPT of 24 layers, 1024 features and 1024 tokens, cut into six stages, five microbatches of
eight samples each; a layer takes 0.055 s forward for a sample, as in SkipPipe's code, and twice that back; activations
in float32. The 18 workers have internet lines ("wan": 80 to 800 Mbit/s each way, drawn and written into the run file,
from which paths are planned), or stand at 18 sites of Google Cloud in an order drawn anew for each draw; then as drawn,
or placed so that stages are near one another. Simulated without elements, message by message, on lines that are shared.

Quality: a byte GPT of six stages, trained with all stages and with four of six in each microbatch, evaluated whole and
with the first stage and three others alone, the mean over all ten choices of these in ascending order.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from decentral.config import Run, validated
from decentral.pipeline import placed
from decentral.replica import evaluate, initial_model, load_params
from decentral.sim.simulate import simulate
from decentral.task import Task

STAGES, VISITS, REPLICAS, MICROBATCHES, SAMPLES = 6, 4, 3, 5, 8
LAYERS, WIDTH, CONTEXT = 24, 1024, 1024
STEPS = 2
DRAWS = 3
WAN_BPS = (80e6, 800e6)
CLOUD = (
    *(
        "us-central1-a",
        "us-east1-b",
        "us-east4-a",
        "us-west1-a",
        "us-west4-a",
        "northamerica-northeast1-a",
        "europe-west1-b",
    ),
    *("europe-west2-a", "europe-west3-a", "europe-west4-a", "europe-west6-a", "europe-north1-a", "asia-east1-a"),
    *("asia-northeast1-a", "asia-south1-a", "asia-southeast1-a", "australia-southeast1-a", "southamerica-east1-a"),
)
PATHS: dict[str, Any] = {
    "all stages": "straight",
    "random skipping": {"name": "skip", "visits": VISITS, "plan": "random"},
    "planned skipping": {"name": "skip", "visits": VISITS},
}


def timed(paths: Any, workers: list[dict[str, Any]], seed: int) -> Run:
    """Return a run of the large model on these workers."""
    return validated(
        {
            "seed": seed,
            "steps": STEPS,
            "batch_size": SAMPLES * MICROBATCHES,
            "evaluate_every": 0,
            "patience_s": 36_000,
            "task": {"name": "byte_gpt", "width": WIDTH, "depth": LAYERS, "heads": 16, "context": CONTEXT},
            "rule": {"name": "local_sgd", "period": STEPS},
            "inner": {"name": "adamw", "lr": 1e-3},
            "pipeline": {"stages": STAGES, "microbatches": MICROBATCHES, "head": "first", "paths": paths},
            "fleet": {
                "step_time_s": 3 * 0.055 * LAYERS * SAMPLES * MICROBATCHES,
                "workers": workers,
            },
        },
        "skip_pipe",
    )


def fleet_of(kind: str, chance: random.Random) -> list[dict[str, Any]]:
    if kind.startswith("cloud"):
        return [{"site": f"gcp:{site}"} for site in chance.sample(CLOUD, len(CLOUD))]
    slowest, fastest = WAN_BPS
    return [
        {"site": "wan", **{line: slowest * (fastest / slowest) ** chance.random() for line in ("up_bps", "down_bps")}}
        for _ in range(STAGES * REPLICAS)
    ]


def iteration_s(run: Run) -> float:
    """Return the virtual seconds of a local step, from two runs, so that the round at the end does not count."""
    seconds = [
        simulate(run.model_copy(update={"steps": steps}), timing_only=True).seconds for steps in (STEPS, 2 * STEPS)
    ]
    return (seconds[1] - seconds[0]) / STEPS


def times(draws: int) -> None:
    print(f"{'fleet':32} {'paths':18} {'s / iteration':>14} {'of all stages':>14} (min, max)")
    for fleet in ("wan", "wan, placed", "cloud", "cloud, placed"):
        found: dict[str, list[float]] = {name: [] for name in PATHS}
        for seed in range(draws):
            workers = fleet_of(fleet, random.Random(seed))
            for name, paths in PATHS.items():
                run = timed(paths, workers, seed)
                if fleet.endswith("placed"):
                    nbytes = 4 * SAMPLES * CONTEXT * WIDTH
                    run = run.model_copy(update={"fleet": placed(run.fleet, STAGES, nbytes, seed)})
                found[name].append(iteration_s(run))
        for name, seconds in found.items():
            ratios = [mine / full for mine, full in zip(seconds, found["all stages"], strict=True)]
            print(
                f"{fleet:32} {name:18} {statistics.median(seconds):14.1f} {statistics.median(ratios):14.3f} "
                f"({min(ratios):.3f}, {max(ratios):.3f})",
                flush=True,
            )


class Some(nn.Module):
    """Some blocks of a model, one after the other."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return values


def bits(task: Task, model: nn.Module) -> float:
    return evaluate(task, model)["loss"] / math.log(2)


def quality(seed: int) -> None:
    for name, paths in (("all stages", "straight"), ("four of six", {"name": "skip", "visits": VISITS})):
        run = validated(
            {
                "seed": seed,
                "steps": 200,
                "batch_size": 2 * MICROBATCHES,
                "evaluate_every": 0,
                "task": {"name": "byte_gpt", "width": 64, "depth": 12, "heads": 4, "context": 64},
                "rule": {"name": "ddp"},
                "inner": {"name": "adamw", "lr": 3e-3, "warmup_steps": 20, "clip_norm": 1.0},
                "pipeline": {"stages": STAGES, "microbatches": MICROBATCHES, "head": "first", "paths": paths},
                "fleet": {"workers": [{"count": STAGES * REPLICAS}]},
            },
            "skip_pipe",
        )
        task, outcome = run.make_task(), simulate(run)
        model = initial_model(task, run.seed)
        load_params(model, outcome.merged())
        cut, blocks = run.pipeline.cut(task, run.seed, run.batch_size), list(task.blocks(model))
        first, head = ([blocks[index] for index in held] for held in cut.held[0])
        with torch.no_grad():
            partial = [
                bits(task, Some([*first, *(blocks[index] for stage in chosen for index in cut.middle(stage)), *head]))
                for chosen in itertools.combinations(range(1, STAGES), VISITS - 1)
            ]
            whole = bits(task, model)
        print(
            f"trained with {name:12} whole {whole:.3f} bits per byte, four of six stages "
            f"{statistics.fmean(partial):.3f} ({min(partial):.3f} to {max(partial):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draws", nargs="?", type=int, default=DRAWS, help="how many sets of lines to draw")
    times(parser.parse_args().draws)
    quality(0)
