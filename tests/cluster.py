"""Small simulated clusters for tests: real rules on real (tiny) models, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from decentral.config import Run
from decentral.fleet import Event, Fleet, WorkerGroup
from decentral.inner import SGD, Inner
from decentral.journal import Synced
from decentral.outcome import Outcome
from decentral.part import Part
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.protocols.schedule import Schedule
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch
from decentral.task import Task
from decentral.tasks import Quadratic

STILL = {"name": "quadratic", "dimension": 16, "curvature": (1e-30, 1e-30)}
"""A task whose gradient is too small to move a float32: what changes parameters is the rule alone."""


def cluster(
    rule: SyncRule,
    workers: int = 4,
    steps: int = 12,
    *,
    task: dict[str, Any] | None = None,
    inner: Inner | None = None,
    speeds: Iterable[float] | None = None,
    events: Iterable[Event] = (),
    seed: int = 0,
    patience_s: float = 60.0,
    batch_size: int = 1,
    **fleet: Any,
) -> Run:
    """Return a run of equal workers (or of these `speeds`) on `task`, with SGD of 0.1 unless `inner` says otherwise."""
    groups = tuple(WorkerGroup(speed=speed) for speed in speeds) if speeds else (WorkerGroup(count=workers),)
    return Run(
        rule=rule,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        evaluate_every=0,
        patience_s=patience_s,
        task=task or {"name": "quadratic", "dimension": 16},
        inner=inner or SGD(lr=0.1),
        fleet=Fleet(workers=groups, events=tuple(events), **fleet),
    )


def crash(at_s: float, worker: int) -> Event:
    return Event(at_s=at_s, worker=worker)


def quadratic(run: Run) -> Quadratic:
    task = run.make_task()
    assert isinstance(task, Quadratic)
    return task


def replicas(outcome: Outcome) -> Tensor:
    """Return the finished workers' parameters, [workers, P] in ascending order."""
    return torch.stack([outcome.params[worker] for worker in sorted(outcome.params)])


def timed_by_messages(run: Run) -> Outcome:
    """Return the times of a run whose every message is simulated, none worked out without: to the bit."""
    return simulate(run, timing_only=True, watch=Watch(links=True))


def all_equal(outcome: Outcome) -> bool:
    """Say whether all finished workers hold the same bits."""
    rows = replicas(outcome)
    return all(torch.equal(row, rows[0]) for row in rows)


def rounds(outcome: Outcome, channel: str = "sync") -> dict[int, list[Synced]]:
    """Return the records of a channel's rounds, by round, in ascending order of workers."""
    found: dict[int, list[Synced]] = {}
    for record in outcome.records:
        if isinstance(record, Synced) and record.channel == channel:
            found.setdefault(record.round, []).append(record)
    return {number: sorted(found[number], key=lambda record: record.worker) for number in sorted(found)}


def outcomes(outcome: Outcome, channel: str = "sync") -> list[set[tuple[str, tuple[int, ...]]]]:
    """Return for each round of a channel what its workers say of it: one (outcome, members) if they agree."""
    return [{(item.outcome, item.members) for item in items} for items in rounds(outcome, channel).values()]


def scripted(script: Callable[[Peer], Awaitable[Any]]) -> tuple[SyncRule, dict[int, Any]]:
    """Return a rule that does what `script` does, and the dictionary where it leaves what `script` returned."""
    results: dict[int, Any] = {}

    class Script(SyncRule):
        async def run(self, peer: Peer) -> None:
            results[peer.id] = await script(peer)

    return Script(), results


def drive(script: Callable[[Peer], Awaitable[Any]], workers: int = 4, **options: Any) -> dict[int, Any]:
    """Run `script` on every worker of a cluster; return what it returned, by worker."""
    rule, results = scripted(script)
    simulate(cluster(rule, workers, **options))
    return results


def start_of(worker: int, size: int, seed: int = 0) -> Tensor:
    """Return normal numbers that belong to the worker, [size]."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + worker))


def apart(rule: SyncRule, seed: int = 0) -> SyncRule:
    """Return the rule with workers that start from different points (`start_of`)."""
    base = type(rule)

    class Apart(base):  # type: ignore[misc, valid-type]
        async def run(self, peer: Peer) -> None:
            peer.params.copy_(start_of(peer.id, peer.params.numel(), seed))
            await super().run(peer)

    fields = {field: getattr(rule, field) for field in base.model_fields}
    return Apart(**fields)  # type: ignore[no-any-return]


class Watched(Schedule):
    """A round every `period` steps; keeps everybody's parameters as they are between rounds, the first too."""

    period: int = 1
    seen: Any = None

    def steps(self, peer: Peer) -> int:
        self.seen.setdefault(peer.id, []).append(peer.params.clone())
        return self.period

    def history(self) -> Tensor:
        """Return the parameters before the first round and after each, [rounds + 1, workers, P]."""
        return torch.stack([torch.stack(self.seen[worker]) for worker in sorted(self.seen)], dim=1)


def watched(period: int = 1) -> Watched:
    return Watched(period=period, seen={})


def spread(history: Tensor) -> Tensor:
    """Return the sum of squared distances from the mean, for [..., workers, P]: [...] float64."""
    history = history.double()
    return (history - history.mean(dim=-2, keepdim=True)).square().sum(dim=(-2, -1))


class Net(Task):
    """A small network on made-up regression: losses that are no quadratics, several parameter tensors."""

    hidden: int = 4

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 2), nn.Tanh(), nn.Linear(2, 1)
        )

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(worker * 100_003 + start)
        inputs = torch.randn(size, 3, generator=generator)
        return inputs, (inputs.prod(dim=1, keepdim=True) + worker).sin()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.loss(model, self.batch(99, 0, 8)).item()}


NET = {"name": "cluster:Net"}


def short(part: Any) -> str | None:
    """Return a test id: a part's name and the fields that were set."""
    if not isinstance(part, Part):
        return None
    return " ".join([part.name, *(f"{field}={getattr(part, field)}" for field in sorted(part.model_fields_set))])
