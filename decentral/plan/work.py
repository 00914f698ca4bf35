"""What is to be trained, whoever does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet.units import HOUR_S
from decentral.sim.durations import fleet_of
from decentral.sim.engine import phantoms

STEADY = "a plan takes a fleet as it stays, and churn; leave it out"


@dataclass(frozen=True, slots=True)
class Work:
    """So many samples of a run file's task on its fleet; every group of the fleet says how long a local step takes."""

    run: Run
    samples: int
    """Of all workers together."""
    parameters: int
    layers: int
    unfit: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Why a rule cannot be tried on a device, by the names of both."""

    def steps(self, workers: int) -> int:
        """Return the local steps of each of so many workers: at least so many that all samples are trained on."""
        return math.ceil(self.samples / (workers * self.run.batch_size))


def work_of(run: Run, *, samples: float | None = None, tokens: float | None = None) -> Work:
    """Return the work of a run file: so many samples or tokens, or those of its own local steps if neither is given.

    Raises `ConfigError` for what no plan can be made of: a run file without a fleet or without an amount of work, one
    that tells what happens when, and a model that is cut into stages.
    """
    _check(run)
    task = run.make_task()
    layout = phantoms(run.model_copy(update={"fleet": run.fleet.first(1)}), task)[0].layout
    if samples is not None and tokens is not None:
        raise ConfigError("--samples and --tokens both say how much is trained; give one of them")
    if tokens is not None:
        if task.tokens_per_sample is None:
            raise ConfigError(f"--tokens: samples of the task '{run.task['name']}' are no tokens; give --samples")
        samples = tokens / task.tokens_per_sample
    if samples is None:
        if "steps" not in run.model_fields_set:
            raise ConfigError("plan: nobody says how much is trained; give --tokens or --samples, or steps in the file")
        samples = run.steps * run.fleet.size * run.batch_size
    if not 1 <= samples < math.inf:
        raise ConfigError(f"plan: there are {samples:g} samples to train on; give --tokens or --samples of at least 1")
    fleet = fleet_of(run, task, layout.size)
    groups = [group.model_copy(update={"mfu": None}) for group in fleet.workers]  # said by their step times now
    fleet = fleet.model_copy(update={"workers": tuple(groups)})
    return Work(run.model_copy(update={"fleet": fleet}), math.ceil(samples), layout.size, max(1, len(layout.layers())))


def step_s(work: Work) -> list[float]:
    """Return the seconds that a local step takes the workers of each group."""
    fleet = work.run.fleet
    return [(group.step_time_s or fleet.step_time_s) / group.speed for group in fleet.workers]


def dollars_per_s(work: Work) -> float | None:
    """Return what all machines cost in a second; None if nobody says what one of them costs."""
    prices = [group.price for group in work.run.fleet.workers for _ in range(group.count)]
    known = [price for price in prices if price is not None]
    return sum(known) / HOUR_S if len(known) == len(prices) else None


def _check(run: Run) -> None:
    if "fleet" not in run.model_fields_set:
        raise ConfigError("plan: the file has no [fleet]; describe the machines there (decentral profile measures one)")
    if run.pipeline.stages > 1:
        raise ConfigError("pipeline.stages: a plan is for whole models; leave it out")
    fleet = run.fleet
    told = {
        "fleet.events": fleet.events,
        "fleet.network.partitions": fleet.network.partitions,
        "fleet.network.links: daily_dip": any(link.daily_dip for link in fleet.network.links),
        "fleet.workers: start_s": any(group.start_s for group in fleet.workers),
        "fleet.workers: slowing": any(group.slowing for group in fleet.workers),
        "fleet.workers: stalls": any(group.stalls for group in fleet.workers),
    }
    for place, value in told.items():
        if value:
            raise ConfigError(f"{place}: {STEADY}")
