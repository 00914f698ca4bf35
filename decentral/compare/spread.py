"""How far the replicas of a run are from each other at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from decentral.config import Run
from decentral.errors import TaskError
from decentral.outcome import Outcome
from decentral.replica import initial_model, load_params
from decentral.task import Task


@dataclass(frozen=True, slots=True)
class Spread:
    """How replicas differ: 0 and 0 if all are equal."""

    distance: float
    """Root mean square distance of the replicas' parameters to their mean, by the norm of that mean."""
    divergence: float | None
    """Jensen-Shannon divergence of their predictions on held-out data, nats; None if the task makes none known."""


def spread_of(run: Run, task: Task, outcome: Outcome) -> Spread:
    """Return the spread of the replicas that were there at the end. Raises `TaskError` as the task does."""
    replicas = _replicas(outcome)
    if all(replica.equal(replicas[0]) for replica in replicas):
        return Spread(0.0, None if _predictions(run, task, replicas[0]) is None else 0.0)
    return Spread(distance(replicas), divergence(_predictions(run, task, replica) for replica in replicas))


def distance(replicas: list[Tensor]) -> float:
    """Return sqrt(mean_i |x_i - m|^2) / |m| for replicas `[P]` with the mean m; infinite if that is zero."""
    mean = torch.stack(replicas).double().mean(dim=0)
    apart = math.sqrt(math.fsum(float((each - mean).square().sum()) for each in replicas) / len(replicas))
    norm = float(mean.norm())
    return apart / norm if norm else math.inf


def divergence(predictions: Iterable[Tensor | None]) -> float | None:
    """Return H(mean_i p_i) - mean_i H(p_i), averaged over items, nats, for log-probabilities `[items, classes]` each.

    Between 0, for equal predictions, and the logarithm of the number of replicas, for certain ones that all differ.
    None if any is. Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    total, entropies, count = torch.zeros(()).double(), 0.0, 0
    for logs in predictions:
        if logs is None:
            return None
        logs = logs.double()
        total = total + logs.exp()
        entropies += _entropy(logs.exp())
        count += 1
    return max(0.0, _entropy(total / count) - entropies / count)


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum(dim=-1).mean())


def _predictions(run: Run, task: Task, params: Tensor) -> Tensor | None:
    model = initial_model(task, run.seed)
    load_params(model, params)
    model.eval()
    try:
        with torch.no_grad():
            return task.predictions(model)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"task.predictions() raised {type(error).__name__}: {error}") from error


def _replicas(outcome: Outcome) -> list[Tensor]:
    """Return the parameters of each replica of which every stage was there at the end, `[P]` each."""
    rows = {outcome.grid.row(worker) for worker in outcome.params}
    whole = [row for row in sorted(rows) if outcome.params.keys() >= set(row)]
    found = [outcome.assemble([outcome.params[worker] for worker in row]) for row in whole]
    return found or [outcome.merged()]
