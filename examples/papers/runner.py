"""What all claims share: a claim, the runs it is made of, and the table of what they came to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table

from decentral.config import Run
from decentral.fleet import Fleet, WorkerGroup
from decentral.inner import AdamW, Inner
from decentral.journal import Trained
from decentral.outcome import Outcome
from decentral.protocols import LocalSGD, SyncRule
from decentral.replica import held_out
from decentral.sim.simulate import simulate

STEP_S = 0.05
"""Virtual seconds of a local step of a worker of speed 1."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a claim's runs of one seed came to: figures by name, and whether each part of the claim held."""

    figures: dict[str, float]
    checks: dict[str, bool]


@dataclass(frozen=True, slots=True)
class Claim:
    """A paper's headline claim. `measure` runs it under a seed; its docstring says what is run and when it holds."""

    name: str
    paper: str
    says: str
    measure: Callable[[int], Findings]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim after all its seeds. It holds if every part of it held under every seed."""

    claim: Claim
    seeds: tuple[int, ...]
    findings: tuple[Findings, ...]
    seconds: float
    """Seconds all its runs took."""

    @property
    def holds(self) -> bool:
        return all(held for found in self.findings for held in found.checks.values())

    def spread(self, figure: str) -> tuple[float, float, float]:
        """Return a figure's median, minimum and maximum over the seeds."""
        values = [found.figures[figure] for found in self.findings]
        return statistics.median(values), min(values), max(values)

    def held(self) -> dict[str, int]:
        """Return under how many seeds each part of the claim held."""
        return {check: sum(found.checks[check] for found in self.findings) for check in self.findings[0].checks}

    def to_table(self) -> dict[str, Any]:
        """Return the verdict as JSON-able values; a figure is its values in the order of the seeds."""
        return {
            "claim": self.claim.name,
            "paper": self.claim.paper,
            "says": self.claim.says,
            "seeds": list(self.seeds),
            "figures": {name: [found.figures[name] for found in self.findings] for name in self.findings[0].figures},
            "held": self.held(),
            "holds": self.holds,
            "seconds": self.seconds,
        }


def judge(claim: Claim, seeds: Sequence[int]) -> Verdict:
    """Run a claim under every seed."""
    began = time.perf_counter()
    findings = tuple(claim.measure(seed) for seed in seeds)
    return Verdict(claim, tuple(seeds), findings, time.perf_counter() - began)


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Return a terminal table: what each paper says, our figures as median (minimum to maximum), and the verdict."""
    table = Table(title="median (minimum to maximum) over the seeds", show_lines=True)
    for column in ("claim", "our figures", "verdict", "why"):
        table.add_column(column)
    for verdict in verdicts:
        claim, seeds = verdict.claim, len(verdict.seeds)
        figures = "\n".join(f"{name}: {_figure(*verdict.spread(name))}" for name in verdict.findings[0].figures)
        why = "\n".join(f"{check}: {count} of {seeds}" for check, count in verdict.held().items())
        verdict_text = "holds" if verdict.holds else "does not hold"
        table.add_row(f"[bold]{claim.name}[/bold]\n{claim.paper}\n{claim.says}", figures, verdict_text, why)
    return table


def _figure(median: float, low: float, high: float) -> str:
    return f"{median:.4g}" if low == high else f"{median:.4g} ({low:.4g} to {high:.4g})"


def gpt(depth: int = 2) -> dict[str, Any]:
    """Return the small byte GPT. Its text and batches do not depend on the run's seed."""
    return {"name": "byte_gpt", "width": 32, "depth": depth, "context": 32, "eval_windows": 256}


def clusters(seed: int, alpha: float | None = None) -> dict[str, Any]:
    """Return the ten classes of `examples.papers.clusters`, whose data depend on the seed."""
    return {
        "name": "examples.papers.clusters:Clusters",
        "seed": seed,
        **({} if alpha is None else {"dirichlet_alpha": alpha}),
    }


def equal(count: int, **fields: Any) -> Fleet:
    """Return a fleet of equal workers."""
    return Fleet(workers=(WorkerGroup(count=count),), step_time_s=STEP_S, **fields)


def run_of(
    rule: SyncRule,
    seed: int,
    steps: int,
    fleet: Fleet,
    task: dict[str, Any] | None = None,
    inner: Inner | None = None,
    **fields: Any,
) -> Run:
    """Return a checked run, on the byte GPT with AdamW unless said otherwise."""
    run = Run(
        seed=seed,
        steps=steps,
        batch_size=8,
        task=task or gpt(),
        rule=rule,
        fleet=fleet,
        inner=inner or AdamW(lr=3e-3, warmup_steps=20, schedule="cosine", clip_norm=1.0),
        **{"evaluate_every": 0, **fields},
    )
    run.check()
    return run


def outcome_of(run: Run) -> Outcome:
    """Return what the run comes to in virtual time."""
    return simulate(run)


def loss_of(run: Run) -> float:
    """Return the held-out loss, nats, of the mean of the replicas at the end."""
    return simulate(run).after["loss"]


def alone(run: Run, rule: SyncRule | None = None) -> float:
    """Return the held-out loss of one worker that does the same local steps, under the rule or by itself."""
    by_itself = rule or LocalSGD(period=run.steps)
    return loss_of(run.model_copy(update={"rule": by_itself, "fleet": equal(1)}))


def bytes_sent(outcome: Outcome) -> float:
    """Return the bytes that a worker has sent, mean over workers."""
    return statistics.mean(record.sent_bytes for record in outcome.left())


def computing(outcome: Outcome) -> float:
    """Return the share of their time that workers have trained, mean over workers."""
    shares = [record.seconds["compute"] / max(sum(record.seconds.values()), 1e-12) for record in outcome.left()]
    return statistics.mean(shares)


def replicas(run: Run, outcome: Outcome, metric: str = "loss") -> float:
    """Return a held-out metric of each worker's own replica, mean over workers."""
    task = run.make_task()
    return statistics.mean(held_out(task, run.seed, params)[metric] for params in outcome.params.values())


@dataclass(frozen=True, slots=True)
class Curve:
    """The first worker's held-out loss in the course of a run."""

    points: tuple[tuple[float, int, float], ...]
    """(virtual seconds, samples that all workers had trained on, loss), in order of time."""

    def at_second(self, second: float) -> float:
        """Return the loss at a virtual second, interpolated; the last one from the end on."""
        return _interpolated([(time_s, loss) for time_s, _, loss in self.points], second)

    def at_samples(self, samples: float) -> float:
        """Return the loss when so many samples were trained on, interpolated; the last one from the end on."""
        return _interpolated([(float(count), loss) for _, count, loss in self.points], samples)

    def samples_at(self, second: float) -> float:
        """Return the samples that were trained on at a virtual second, interpolated."""
        return _interpolated([(time_s, float(count)) for time_s, count, _ in self.points], second)

    def second_of(self, loss: float) -> float:
        """Return the first virtual second, interpolated, at which the loss is no higher; infinity if it stays above."""
        before = self.points[0]
        for point in self.points:
            if point[2] <= loss:
                share = (before[2] - loss) / (before[2] - point[2]) if before[2] > point[2] else 0.0
                return before[0] + share * (point[0] - before[0])
            before = point
        return float("inf")


def curve_of(outcome: Outcome) -> Curve:
    """Return the curve of a run with `evaluate_every`."""
    trained = sorted((record.time_s, record.samples) for record in outcome.records if isinstance(record, Trained))
    points, samples, index = [(0.0, 0, outcome.before["loss"])], 0, 0
    for record in outcome.evaluations():
        while index < len(trained) and trained[index][0] <= record.time_s:
            samples += trained[index][1]
            index += 1
        points.append((record.time_s, samples, record.metrics["loss"]))
    return Curve(tuple(points))


def _interpolated(points: Sequence[tuple[float, float]], place: float) -> float:
    for (left, low), (right, high) in pairwise(points):
        if left <= place < right:
            return low + (high - low) * (place - left) / (right - left)
    return points[-1][1]
