"""What the simulator predicts, against the same run file on real Ray nodes whose links are really thin.

    make fidelity

Round times and total times must agree within `WITHIN`. A local step takes a stated time (`Paced`). Where there are more
workers than cores, steps and lines are that many times slower than stated (`slower`). Everything else that a prediction
needs is measured before, as a user would with `decentral profile`: a step, coding, and what a message takes that has to
go nowhere; and on wide lines, how long it takes until a death is known and another life of the worker is there. The
lines' rates are those that `tc` is told, of which headers take their share (`fleet.network.overhead`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
VICTIM, DIES_AT = 2, 25
"""The worker that is killed, and before which of its local steps."""
STEPS_WITH_A_DEATH = 100
"""So many that its next life has the state, and takes part, well before the end."""
WIDE_MBIT = 1000.0


class Death(NamedTuple):
    """What follows a worker's death, in seconds after it: the others know, and its next life asks for the state."""

    known_s: float
    replaced_s: float


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


@pytest.fixture(scope="module")
def death(nodes: Cluster, machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Death:
    """How long all this takes here where no line holds anybody up."""
    run = run_with_a_death(WIDE_MBIT, machine)
    records = measured(run, WIDE_MBIT, nodes, tmp_path_factory.mktemp("death"))
    left, joined = (
        [record.time_s for record in records if isinstance(record, kind) and record.worker == VICTIM]
        for kind in (Left, Joined)
    )
    died_s = death_s(run, records)
    return Death(known_s=left[0] - died_s, replaced_s=joined[1] - died_s)


def slower(workers: int) -> float:
    """Return how many times slower than stated steps and lines are, so that each machine has a core's worth to itself.

    Machines have processors of their own; here they share this one's cores. Whatever takes that many times as long
    leaves each worker what a core does in the stated time: Gupta et al., "To infinity and beyond: time-warped network
    emulation", 2006.
    """
    return max(1.0, workers / (os.cpu_count() or 1))


def run_of(
    rule: str, mbit: float, machine: Machine, *, speeds: tuple[float, ...], steps: int | None = None, **task: Any
) -> Run:
    times = slower(len(speeds))
    step_s = machine.get("step_time_s")
    if step_s is not None:  # as measured with steps as long as stated
        machine = {**machine, "step_time_s": step_s + (times - 1) * STEP_S}
    mbit /= times
    return validated(
        {
            "steps": steps or STEPS[rule],
            "batch_size": 1,
            "evaluate_every": 0,
            "task": {
                "name": "tests.worlds.fidelity.tasks:Paced",
                "dimension": DIMENSION,
                "step_s": times * STEP_S,
                **task,
            },
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
    nodes.limit(mbit / slower(run.fleet.size))
    write_run(run, folder / "run.toml")
    nodes.train(folder / "run.toml", folder / "out", timeout_s=180)
    return list(read_journal(folder / "out" / "journal.jsonl"))


def run_with_a_death(mbit: float, machine: Machine) -> Run:
    return run_of("diloco", mbit, machine, speeds=(1.0,) * 4, steps=STEPS_WITH_A_DEATH, dies=VICTIM, dies_at=DIES_AT)


def death_s(run: Run, records: list[Record]) -> float:
    """Return when the victim died, of whose last phase nobody has heard: so many steps after the round before it."""
    rounds, steps = divmod(DIES_AT, RULES["diloco"]["period"])
    begun_s = max(record.time_s for record in records if isinstance(record, Synced) and record.round == rounds)
    return begun_s + steps * run.fleet.step_time_s


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


def test_a_kill(
    nodes: Cluster, machine: Machine, death: Death, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_a_death(25, machine)
    died_s = death_s(run, simulate(run, timing_only=True).records)
    events = [
        {"at_s": died_s, "kind": "crash", "worker": VICTIM},
        {"at_s": died_s + death.replaced_s, "kind": "join", "worker": VICTIM},
    ]
    fleet = {**run.fleet.to_table(), "events": events, "detection_s": death.known_s}
    predicted = simulate(validated({**run.to_fields(), "fleet": fleet}, "fidelity"), timing_only=True).records
    compare("diloco, a worker killed", measured(run, 25, nodes, tmp_path), predicted, capsys)
