"""The runs of the comparison: each rule until it reaches the target loss, with and without churn."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from decentral.config import Run, Sim, read_run
from decentral.fleet.units import HOUR_S
from decentral.journal import Evaluated, Joined, Left, Record, Synced
from decentral.outcome import Outcome
from decentral.protocols import LocalSGD
from decentral.sim.simulate import simulate

RUN_FILE = Path(__file__).parent / "run.toml"
RULES = ("ddp", "diloco", "streaming_diloco", "noloco", "async_local_sgd")
ALONE = "one machine"
ALONE_STEPS = 4000
"""A single worker may take so many local steps, for nobody shares its work."""
SCALE = 31_738
"""Times that the model that is meant is larger than the one that is trained; see the run file."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to when the first worker's held-out loss reached the target, or at its end if it did not.

    Hours are virtual; dollars and bytes are the real model's.
    """

    name: str
    churn: bool
    seed: int
    reached: bool
    hours: float
    machine_dollars: float
    egress_dollars: float
    goodput: float
    nbytes: float
    degraded: int
    skipped: int
    lost: float
    """Share of the samples trained on that were lost with a machine."""
    curve: tuple[tuple[float, float, float], ...]
    """(hours, dollars, held-out loss, nats) at each evaluation. Machines are billed as they are there; egress, of which
    the total is known, is taken to have come in proportion to that."""

    @property
    def dollars(self) -> float:
        return self.machine_dollars + self.egress_dollars


def runs(seed: int) -> list[tuple[str, bool, Run]]:
    """Return name, churn and run of each rule with and without churn, and of one machine alone."""
    churning = read_run(RUN_FILE, [f"seed={seed}", "sim.processes=1"])
    quiet = without_churn(churning)
    made = [(name, run is churning, run.with_rule(name)) for name in RULES for run in (quiet, churning)]
    return [*made, (ALONE, False, alone(quiet))]


def without_churn(run: Run) -> Run:
    """Return the run with machines that stay."""
    return run.model_copy(update={"fleet": run.fleet.model_copy(update={"churn": None})})


def alone(run: Run) -> Run:
    """Return the run of a single machine that nobody takes away."""
    first = run.fleet.workers[0].model_copy(update={"count": 1})
    fleet = run.fleet.model_copy(update={"workers": (first,), "network": type(run.fleet.network)()})
    rule = LocalSGD(period=run.evaluate_every)  # evaluations come between phases
    return run.model_copy(update={"fleet": fleet, "rule": rule, "steps": ALONE_STEPS, "sim": Sim(processes=1)})


def measure(name: str, churn: bool, run: Run, target: float) -> Result:
    """Run until the held-out loss, nats, is no higher than `target`, or to the end."""

    def reached(record: Record) -> bool:
        return isinstance(record, Evaluated) and record.metrics["loss"] <= target

    outcome = simulate(run, until=reached)
    accounts = outcome.accounts
    assert accounts is not None
    assert accounts.dollars is not None
    assert accounts.egress_dollars is not None
    samples = sum(worker.samples for worker in accounts.workers)
    useful = sum(worker.useful_samples for worker in accounts.workers)
    rounds = {(r.channel, r.round, r.members, r.outcome) for r in outcome.records if isinstance(r, Synced)}
    return Result(
        name=name,
        churn=churn,
        seed=run.seed,
        reached=any(reached(record) for record in outcome.evaluations()),
        hours=outcome.seconds / HOUR_S,
        machine_dollars=accounts.dollars,
        egress_dollars=accounts.egress_dollars,
        goodput=accounts.goodput or 0.0,
        nbytes=SCALE * sum(worker.sent_bytes for worker in accounts.workers),
        degraded=sum(what == "degraded" for *_, what in rounds),
        skipped=sum(what == "skipped" for *_, what in rounds),
        lost=1 - useful / samples,
        curve=_curve(outcome, accounts.dollars + accounts.egress_dollars),
    )


def _curve(outcome: Outcome, dollars: float) -> tuple[tuple[float, float, float], ...]:
    moments = sorted(
        (record.time_s, 1 if isinstance(record, Joined) else -1)
        for record in outcome.records
        if isinstance(record, Joined | Left)
    )
    times, rented = [0.0], [0.0]  # machine-seconds by then, between which it is linear
    there = 0
    for at_s, change in moments:
        rented.append(rented[-1] + there * (at_s - times[-1]))
        times.append(at_s)
        there += change
    points = []
    for record in outcome.evaluations():
        place = min(bisect_right(times, record.time_s), len(times) - 1)
        span = times[place] - times[place - 1]
        share = (record.time_s - times[place - 1]) / span if span else 0.0
        so_far = rented[place - 1] + share * (rented[place] - rented[place - 1])
        points.append((record.time_s / HOUR_S, dollars * so_far / rented[-1], record.metrics["loss"]))
    return tuple(points)
