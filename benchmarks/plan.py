"""Plans against real runs: is the first choice the best, and does it take as long and send as much as predicted?

    python -m benchmarks.plan                       # all fleets: root, a quiet machine, about an hour
    python -m benchmarks.plan two-wide four-narrow  # these alone

For each fleet of the list the same samples are trained under every rule of `RULES`, with the workers that suit the
rule best by its forecast, on Ray nodes in network namespaces whose lines the kernel limits (`tests/worlds/fidelity`). A
local step takes a stated time, so that four workers on two cores do not slow each other down. Latency, and lines that
differ among the workers of a fleet, are the transport's (`real.shape_links`): the kernel here delays nothing, and Ray
chooses the nodes. Step, coding and message are measured first, as `decentral profile` does. What comes near the
quickest is done `TURNS` times. The first choice (*) is the best if no other's median is below its own quickest turn.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decentral import profile
from decentral.config import Run, validated, write_run
from decentral.journal import Joined, Left, read_journal
from decentral.plan import Wanted, work_of
from decentral.plan.search import search
from decentral.plan.table import settings_text
from decentral.plan.wanted import Option
from decentral.protocols import DDP, DiLoCo, Every, Float32, Int8, NoLoCo, StreamingDiLoCo, SyncRule
from decentral.workers.rpc import Keys
from tests.worlds.fidelity.namespaces import OVERHEAD, Cluster, cluster, why_not

NODES = 4
DIMENSION = 250_000
STEP_S = 0.25
SAMPLES = 80
"""Of all workers together; a local step is one sample."""
TURNS = 3
NEAR = 0.1
"""What is slower than the quickest by more than this share is done once: it is not the best."""
WIDE = 1000.0
"""Mbit/s of a line that holds nobody up."""
RULES: tuple[SyncRule, ...] = (
    DDP(),
    DiLoCo(period=Every(period=5), codec=Float32()),
    DiLoCo(period=Every(period=10), codec=Int8()),
    StreamingDiLoCo(period=5, codec=Int8(), all_reduce="butterfly"),
    NoLoCo(period=Every(period=10)),
)
Machine = dict[str, float | None]
"""Fields of a fleet."""


class Small(NamedTuple):
    """A fleet of the list."""

    speeds: tuple[float, ...]
    mbit: tuple[float, ...]
    """Line of each worker, the same both ways; one figure for all."""
    latency_s: float = 0.0


FLEETS: dict[str, Small] = {
    "two-wide": Small((1.0, 1.0), (WIDE,)),
    "four-wide": Small((1.0,) * 4, (WIDE,)),
    "four-medium": Small((1.0,) * 4, (100.0,)),
    "four-narrow": Small((1.0,) * 4, (25.0,)),
    "two-thin": Small((1.0, 1.0), (8.0,)),
    "one-of-three-slow": Small((1.0, 1.0, 0.5), (50.0,)),
    "two-of-four-slow": Small((1.0, 1.0, 0.3, 0.3), (100.0,)),
    "one-line-thin": Small((1.0,) * 4, (100.0, 100.0, 100.0, 2.0)),
    "two-distant": Small((1.0, 1.0), (50.0,), 0.05),
    "four-distant": Small((1.0,) * 4, (100.0,), 0.1),
}


class Measured(NamedTuple):
    """What a real run came to."""

    seconds: float
    sent_bytes: int


def machine_here() -> Machine:
    """Return what `decentral profile` says of this machine, whose links it takes to be the loopback."""
    run = run_of(FLEETS["two-wide"], {}, DiLoCo(codec=Int8()))
    return {
        "step_time_s": profile.measure_steps(run).median_s,
        "coding_bps": asyncio.run(profile.measure_coding(run)),
        "latency_s": asyncio.run(profile.measure_loopback(Keys("the secret of a benchmark"), run.patience_s)).latency_s,
    }


def run_of(fleet: Small, machine: Machine, rule: SyncRule) -> Run:
    """Return the work of every plan, on a fleet of machines like this one."""
    lines = fleet.mbit if len(fleet.mbit) > 1 else fleet.mbit * len(fleet.speeds)
    groups = [
        {"speed": speed, "up_bps": mbit * 1e6, "down_bps": mbit * 1e6}
        for speed, mbit in zip(fleet.speeds, lines, strict=True)
    ]
    table: dict[str, Any] = {
        "steps": SAMPLES,
        "batch_size": 1,
        "evaluate_every": 0,
        "task": {"name": "tests.worlds.fidelity.tasks:Paced", "dimension": DIMENSION, "step_s": STEP_S},
        "rule": rule.to_table(),
        "inner": {"name": "sgd", "lr": 0.1},
        "fleet": {
            **machine,
            "latency_s": (machine.get("latency_s") or 0.0) + fleet.latency_s,
            "workers": groups,
            "network": {"overhead": OVERHEAD},
        },
        "real": {"stream_bps": 0, "shape_links": fleet.latency_s > 0 or len(fleet.mbit) > 1},
    }
    return validated(table, "benchmark")


def options_of(fleet: Small, machine: Machine) -> tuple[Option, list[Option]]:
    """Return the first choice, and the best way to do the work under each rule."""
    wanted, work = Wanted(), work_of(run_of(fleet, machine, RULES[0]), samples=SAMPLES)
    options = search(work, wanted, rules=RULES, least_crews=len(RULES))
    best: dict[int, Option] = {}
    for option in wanted.kept(options):
        best.setdefault(option.place, option)
    first = wanted.choice(options)
    best[first.place] = first
    return first, [best[place] for place in sorted(best)]


def measured(option: Option, fleet: Small, nodes: Cluster) -> Measured:
    """Train for real."""
    nodes.limit(max(fleet.mbit))
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "run.toml", Path(folder) / "out"
        write_run(option.run, file)
        nodes.train(file, out, timeout_s=120)
        records = list(read_journal(out / "journal.jsonl"))
    left = [record for record in records if isinstance(record, Left)]
    began = min(record.time_s for record in records if isinstance(record, Joined))
    return Measured(max(each.time_s for each in left) - began, sum(each.sent_bytes for each in left))


def judged(name: str, machine: Machine, nodes: Cluster) -> tuple[float, bool]:
    """Print a fleet's table; return by what share the first choice is slower than the best, and whether it is this."""
    fleet = FLEETS[name]
    first, options = options_of(fleet, machine)
    print(f"\n{name}: speeds {fleet.speeds}, Mbit/s {fleet.mbit}, {fleet.latency_s:g} s apart")
    turns = [[measured(option, fleet, nodes)] for option in options]
    quickest = min(came.seconds for (came,) in turns)
    near = [place for place, (came,) in enumerate(turns) if came.seconds <= (1 + NEAR) * quickest]
    for _ in range(TURNS - 1):
        for place in near:
            turns[place].append(measured(options[place], fleet, nodes))
    heads = f"  {'rule':<38}{'workers':>8}{'predicted':>11}{'measured':>10}"
    print(f"{heads}{'':>8}{'least':>8}{'most':>8}{'sent, kB':>10}{'':>8}")
    medians = []
    for option, came in zip(options, turns, strict=True):
        told, seconds = option.forecast, [each.seconds for each in came]
        medians.append(statistics.median(seconds))
        sent = came[0].sent_bytes
        apart = f"{sent / told.sent_bytes - 1:>+8.2%}" if told.sent_bytes else ""  # one worker sends nothing
        print(
            f"{'*' if option is first else ' '} {settings_text(option.run.rule):<38}{option.run.fleet.size:>8}"
            f"{told.seconds:>10.2f}s{medians[-1]:>9.2f}s{medians[-1] / told.seconds - 1:>+8.1%}"
            f"{min(seconds):>7.2f}s{max(seconds):>7.2f}s{sent / 1e3:>10.1f}{apart}",
            flush=True,
        )
    own = options.index(first)
    return medians[own] / min(medians) - 1, min(medians) >= min(each.seconds for each in turns[own])


def main(names: Sequence[str]) -> None:
    """Judge the fleets of these names, all if there are none."""
    unknown = sorted(set(names) - set(FLEETS))
    if unknown:
        sys.exit(f"no such fleet: {', '.join(unknown)}; fleets: {', '.join(FLEETS)}")
    if reason := why_not():
        print(f"plan: {reason}")
        return
    machine = machine_here()
    print(machine)
    with cluster(NODES) as nodes:
        judgements = [judged(name, machine, nodes) for name in names or FLEETS]
    best, most = sum(is_best for _, is_best in judgements), max(slower for slower, _ in judgements)
    print(f"\nfirst choice the best measured: {best} of {len(judgements)}; slower than this by {most:.1%} at most")


if __name__ == "__main__":
    main(sys.argv[1:])
