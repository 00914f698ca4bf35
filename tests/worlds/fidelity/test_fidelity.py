"""What the simulator predicts, against the same run file on real Ray nodes whose links are really thin.

    make fidelity

Round times and total times must agree within `WITHIN`. A local step takes a stated time (`Paced`), so that six workers
on two cores are not slowed down by each other. Everything else that a prediction needs is measured before, as a user
would with `decentral profile`: a step, coding, and what a message takes that has to go nowhere. The lines' rates are
those that `tc` is told, of which headers take their share (`fleet.network.overhead`).
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decentral import profile
from decentral.config import Run, validated, write_run
from decentral.journal import Joined, Left, Record, Synced, read_journal
from decentral.sim.simulate import simulate
from decentral.workers.rpc import Keys
from tests.worlds.fidelity.namespaces import OVERHEAD, Cluster, cluster, why_not

pytestmark = pytest.mark.fidelity

NODES = 6
DIMENSION = 1_000_000
STEP_S = 0.1
WITHIN = 0.10
"""How far a prediction may be off, relatively."""
Machine = dict[str, float | None]
"""Fields of a fleet."""
RULES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp", "codec": "int8"},
    "diloco": {"name": "diloco", "period": 10, "codec": "int8"},
    "noloco": {"name": "noloco", "period": 10, "codec": "float32"},
}
STEPS = {"ddp": 20, "diloco": 60, "noloco": 60}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(NODES) as made:
        yield made


@pytest.fixture(scope="module")
def machine() -> Machine:
    """What `decentral profile` says of this machine, whose links it takes to be the loopback."""
    run = run_of("diloco", 25, {}, speeds=(1.0,))
    return {
        "step_time_s": profile.measure_steps(run).median_s,
        "coding_bps": asyncio.run(profile.measure_coding(run)),
        "latency_s": asyncio.run(profile.measure_loopback(Keys("the secret of a test"), run.patience_s)).latency_s,
    }


def run_of(rule: str, mbit: float, machine: Machine, *, speeds: tuple[float, ...], **task: Any) -> Run:
    return validated(
        {
            "steps": STEPS[rule],
            "batch_size": 1,
            "evaluate_every": 0,
            "task": {"name": "tests.worlds.fidelity.tasks:Paced", "dimension": DIMENSION, "step_s": STEP_S, **task},
            "rule": RULES[rule],
            "inner": {"name": "sgd", "lr": 0.1},
            "fleet": {
                **machine,
                "workers": [{"speed": speed} for speed in speeds],
                "up_bps": mbit * 1e6,
                "down_bps": mbit * 1e6,
                "network": {"overhead": OVERHEAD},
            },
            "real": {"stream_bps": 0},
        },
        "fidelity",
    )


def measured(run: Run, mbit: float, nodes: Cluster, folder: Path) -> list[Record]:
    """Return the journal of the run on the real cluster."""
    nodes.limit(mbit)
    write_run(run, folder / "run.toml")
    nodes.train(folder / "run.toml", folder / "out", timeout_s=180)
    return list(read_journal(folder / "out" / "journal.jsonl"))


def round_s(records: list[Record]) -> float:
    """Return the median time from one of a worker's rounds to its next."""
    times: dict[int, list[float]] = {}
    for record in records:
        if isinstance(record, Synced):
            times.setdefault(record.worker, []).append(record.time_s)
    return statistics.median(b - a for each in times.values() for a, b in itertools.pairwise(each))


def total_s(records: list[Record]) -> float:
    began = min(record.time_s for record in records if isinstance(record, Joined))
    return max(record.time_s for record in records if isinstance(record, Left)) - began


def compare(what: str, real: list[Record], predicted: list[Record], capsys: pytest.CaptureFixture[str]) -> None:
    rounds, totals = (round_s(real), round_s(predicted)), (total_s(real), total_s(predicted))
    with capsys.disabled():
        print(
            f"\n{what}: a round {rounds[0]:.3f} s, predicted {rounds[1]:.3f} ({rounds[0] / rounds[1] - 1:+.1%}); "
            f"all {totals[0]:.2f} s, predicted {totals[1]:.2f} ({totals[0] / totals[1] - 1:+.1%})"
        )
    assert rounds[0] == pytest.approx(rounds[1], rel=WITHIN)
    assert totals[0] == pytest.approx(totals[1], rel=WITHIN)


@pytest.mark.parametrize("mbit", [12.5, 25, 50])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_four_equal_workers(
    rule: str,
    mbit: float,
    nodes: Cluster,
    machine: Machine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of(rule, mbit, machine, speeds=(1.0,) * 4)
    predicted = simulate(run, timing_only=True).records
    compare(f"{rule}, 4 workers, {mbit} Mbit/s", measured(run, mbit, nodes, tmp_path), predicted, capsys)


@pytest.mark.parametrize("workers", [2, 6])
def test_more_and_fewer_workers(
    workers: int, nodes: Cluster, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("diloco", 25, machine, speeds=(1.0,) * workers)
    predicted = simulate(run, timing_only=True).records
    compare(f"diloco, {workers} workers, 25 Mbit/s", measured(run, 25, nodes, tmp_path), predicted, capsys)


def test_a_straggler(nodes: Cluster, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("diloco", 25, machine, speeds=(1.0, 1.0, 0.5))
    predicted = simulate(run, timing_only=True).records
    compare("diloco, a worker of half speed", measured(run, 25, nodes, tmp_path), predicted, capsys)


def test_a_kill(nodes: Cluster, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("diloco", 25, machine, speeds=(1.0,) * 4, dies=2, dies_at=25)
    quiet = [record for record in simulate(run, timing_only=True).records if isinstance(record, Synced)]
    second = max(record.time_s for record in quiet if record.round == 2)
    crash = {"at_s": second + 5 * run.fleet.step_time_s, "kind": "crash", "worker": 2}
    fleet = {**run.fleet.to_table(), "events": [crash], "detection_s": 0.5}
    predicted = simulate(validated({**run.to_fields(), "fleet": fleet}, "fidelity"), timing_only=True).records
    compare("diloco, a worker killed", measured(run, 25, nodes, tmp_path), predicted, capsys)
