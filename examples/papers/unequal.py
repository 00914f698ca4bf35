"""Claims about machines that are slow or vanish: delayed Nesterov with DyLU, gradient coding, DBW, MoDeST."""

from __future__ import annotations

from typing import Any

from decentral.config import Run
from decentral.fleet import Event, Fleet, WorkerGroup
from decentral.inner import SGD, AdamW
from decentral.protocols import (
    DDP,
    AsyncLocalSGD,
    DiLoCo,
    DynamicBackupWorkers,
    GradientCoding,
    LocalSGD,
    MoDeST,
    Nesterov,
    OuterSGD,
)
from examples.papers.runner import (
    STEP_S,
    Findings,
    alone,
    clusters,
    curve_of,
    equal,
    outcome_of,
    run_of,
)


def async_local_sgd(seed: int) -> Findings:
    """Delayed Nesterov with DyLU against Nesterov at every push and DiLoCo; speeds 1, 0.75, 0.5, 0.25, H = 10.

    Outer Nesterov of lr 0.7, momentum 0.9 and 0.5; naive also at a quarter of the learning rate, the better of the two
    counting. The inner learning rate is constant, for losses are compared in the middle of runs: the server's when the
    quickest worker has done its 120 steps, and after as many samples as delayed Nesterov had by then. Holds if, under
    both momenta, it is below naive by both measures, below DiLoCo at equal time, and at most 1 % above DiLoCo at equal
    samples.
    """
    steps, inner = 120, AdamW(lr=3e-3, warmup_steps=20, clip_norm=1.0)
    speeds = (1.0, 0.75, 0.5, 0.25)
    fleet = Fleet(workers=tuple(WorkerGroup(speed=speed) for speed in speeds), step_time_s=STEP_S)
    figures: dict[str, float] = {}
    checks: dict[str, bool] = {}
    for momentum in (0.9, 0.5):
        delayed = AsyncLocalSGD(period=10, lr=0.7, momentum=momentum, grace_s=0.05)
        naive = delayed.model_copy(update={"delay": 1, "dylu": False})
        diloco = DiLoCo(period=10, outer=Nesterov(lr=0.7, momentum=momentum))
        rules = {
            "delayed": delayed,
            "naive": naive,
            "naive, lr / 4": naive.model_copy(update={"lr": 0.175}),
            "DiLoCo": diloco,
        }
        runs = {name: run_of(rule, seed, steps, fleet, inner=inner, evaluate_every=10) for name, rule in rules.items()}
        curves = {name: curve_of(outcome_of(run)) for name, run in runs.items()}
        samples = curves["delayed"].samples_at(steps * STEP_S)
        timed = {name: curve.at_second(steps * STEP_S) for name, curve in curves.items()}
        counted = {name: curve.at_samples(samples) for name, curve in curves.items()}
        best_timed, best_counted = (min(found["naive"], found["naive, lr / 4"]) for found in (timed, counted))
        figures |= {f"momentum {momentum}, equal time, {name}": loss for name, loss in timed.items()}
        figures |= {f"momentum {momentum}, equal samples, {name}": loss for name, loss in counted.items()}
        figures[f"momentum {momentum}, one worker with the outer optimiser"] = alone(runs["DiLoCo"], diloco)
        checks |= {
            f"{momentum}: below naive in time": timed["delayed"] < best_timed,
            f"{momentum}: below naive per sample": counted["delayed"] < best_counted,
            f"{momentum}: below DiLoCo in time": timed["delayed"] < timed["DiLoCo"],
            f"{momentum}: within 1 % of DiLoCo per sample": counted["delayed"] <= 1.01 * counted["DiLoCo"],
        }
    figures["one worker"] = alone(runs["DiLoCo"])
    return Findings(figures, checks)


def gradient_coding(seed: int) -> Findings:
    """Gradient coding for one straggler (s = 1) against DDP; eight workers, one of a tenth of the speed, 200 rounds.

    Plain SGD 0.3 on both sides, so that both take the same steps: every coded round sums all eight gradients. Holds if
    the loss after as many rounds is the same to 0.1 %, and the loss that DDP has halfway is reached in half of the
    time or less, though each worker computes twice as much.
    """
    return _in_time(coded_runs(seed), limit=0.5, same_loss=True)


def coded_runs(seed: int) -> dict[str, Run]:
    """Return the runs of `gradient_coding`, the plain one first."""
    fields: dict[str, Any] = {"task": clusters(seed), "inner": SGD(lr=0.3), "evaluate_every": 10}
    rules = {"DDP": DDP(), "coded": GradientCoding(stragglers=1, outer=OuterSGD(lr=0.3))}
    return {name: run_of(rule, seed, 200, _with_straggler(8), **fields) for name, rule in rules.items()}


def dbw(seed: int) -> Findings:
    """Dynamic backup workers against local SGD, H = 4; eight workers, one of a tenth of the speed, 200 steps.

    Server learning rate 1, so that a round of all eight is local SGD's. Holds if the loss that local SGD has
    halfway is reached in half of the time or less. The lowest loss is given beside the final one.
    """
    return _in_time(backed_runs(seed), limit=0.5, same_loss=False)


def backed_runs(seed: int) -> dict[str, Run]:
    """Return the runs of `dbw`, the plain one first."""
    fields: dict[str, Any] = {"task": clusters(seed), "inner": SGD(lr=0.3), "evaluate_every": 8}
    rules = {"local SGD": LocalSGD(period=4), "DBW": DynamicBackupWorkers(period=4)}
    return {name: run_of(rule, seed, 200, _with_straggler(8), **fields) for name, rule in rules.items()}


def _in_time(runs: dict[str, Run], *, limit: float, same_loss: bool) -> Findings:
    """Compare the time in which the second rule reaches the loss that the first one has after half of its time."""
    plain, other = runs
    outcomes = {name: outcome_of(run) for name, run in runs.items()}
    curves = {name: curve_of(outcome) for name, outcome in outcomes.items()}
    half = outcomes[plain].seconds / 2
    target = curves[plain].at_second(half)
    seconds = {plain: half, other: curves[other].second_of(target)}
    figures = {f"final loss, {name}": outcome.after["loss"] for name, outcome in outcomes.items()}
    figures |= {f"lowest loss, {other}": min(loss for _, _, loss in curves[other].points), "loss asked for": target}
    figures |= {f"seconds to it, {name}": second for name, second in seconds.items()}
    figures["final loss, one worker"] = alone(runs[plain])
    checks = {f"time <= {limit:g}": seconds[other] <= limit * seconds[plain]}
    if same_loss:
        checks["same loss"] = abs(outcomes[other].after["loss"] / outcomes[plain].after["loss"] - 1) <= 1e-3
    return Findings(figures, checks)


def _with_straggler(count: int) -> Fleet:
    return Fleet(workers=(WorkerGroup(count=count - 1), WorkerGroup(speed=0.1)), step_time_s=STEP_S, latency_s=0.005)


def modest(seed: int) -> Findings:
    """MoDeST where 16 of 20 workers crash, one every 0.5 s from 3 s on; committees of 4 of which 2 are enough, H = 10.

    Every worker has 100 local steps. The crashes are noticed after 2 s, or after 60 s, which is as if nobody noticed:
    the dead merely answer no more; and once all 16 crash at 3 s, are noticed after 2 s, and all of a committee are
    needed. Holds if in each case the four that are left do all their steps, training goes on (the loss at the end is
    below that when the last one crashes), and the accuracy is at least 98 % of that of four workers alone from the
    beginning.
    """
    rule = MoDeST(period=10, committee=4, success=0.5, ping_s=0.5, aggregation_s=3.0)
    task, inner = clusters(seed), SGD(lr=0.1)
    calm = run_of(rule, seed, 100, equal(20), task, inner, evaluate_every=10)
    four = outcome_of(calm.model_copy(update={"fleet": equal(4)}))
    whole = outcome_of(calm)
    figures = {
        "accuracy, four workers from the beginning": four.after["accuracy"],
        "accuracy, nobody crashes": whole.after["accuracy"],
        "loss, one worker": alone(calm),
        "seconds, nobody crashes": whole.seconds,
    }
    checks: dict[str, bool] = {}
    every = rule.model_copy(update={"success": 1.0})
    cases = {"noticed": (rule, 0.5, 2.0), "unnoticed": (rule, 0.5, 60.0), "at one moment": (every, 0.0, 2.0)}
    for case, (hit_rule, gap_s, detection_s) in cases.items():
        crashes = tuple(Event(at_s=3.0 + gap_s * (worker - 4), worker=worker) for worker in range(4, 20))
        fleet = equal(20, events=crashes, detection_s=detection_s)
        hit = outcome_of(calm.model_copy(update={"rule": hit_rule, "fleet": fleet}))
        done = [record.step for record in hit.left() if record.reason == "finished"]
        at_last, loss = curve_of(hit).at_second(crashes[-1].at_s), hit.after["loss"]
        figures |= {
            f"accuracy, 80 % crash, {case}": hit.after["accuracy"],
            f"loss when the last one crashes, {case}": at_last,
            f"loss at the end, {case}": loss,
            f"seconds, {case}": hit.seconds,
        }
        checks |= {
            f"the four do all steps, {case}": done == [calm.steps] * 4,
            f"training goes on, {case}": loss < at_last,
            f"98 % of the four's accuracy, {case}": hit.after["accuracy"] >= 0.98 * four.after["accuracy"],
        }
    return Findings(figures, checks)
