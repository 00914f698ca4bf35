"""A thousand faults on a real Ray of several nodes: nothing hangs, and survivors agree.

    make chaos

Takes hours, and needs root. The variable DECENTRAL_CHAOS_FAULTS asks for fewer faults.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decentral.config import Run, validated, write_run
from decentral.journal import read_journal
from decentral.verify import verify
from tests.chaos.agreement import require_agreement
from tests.chaos.nodes import FULL_MBIT, NodeStorm, Struck
from tests.chaos.witness import Sight, sights
from tests.worlds.fidelity.namespaces import Cluster, cluster, why_not

pytestmark = pytest.mark.chaos

FAULTS = int(os.environ.get("DECENTRAL_CHAOS_FAULTS", "1000"))
NODES, WORKERS = 6, 5
STEPS = 2000
STEP_S = 0.01
CALM_SHARE = 0.9
PERIOD = 4
WITNESSED = "tests.chaos.witness:Witnessed"
RULES: list[dict[str, Any]] = [
    {"name": WITNESSED + "DiLoCo", "period": PERIOD, "codec": "int8"},
    {"name": WITNESSED + "LocalSGD", "period": PERIOD},
]


def run_of(rule: dict[str, Any], folder: Path) -> Run:
    return validated(
        {
            "steps": STEPS,
            "batch_size": 2,
            "evaluate_every": 0,
            "patience_s": 10.0,
            "task": {"name": "tests.chaos.tasks:Paced", "dimension": 64, "spread": 0.0, "step_s": STEP_S},
            "inner": {"name": "sgd", "lr": 1 / STEPS},
            "rule": {**rule, "folder": str(folder)},
            "fleet": {"workers": [{"count": WORKERS}]},
        },
        "chaos",
    )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(NODES) as made:
        made.limit(FULL_MBIT)
        yield made


def stalls(struck: list[Struck], seen: list[Sight]) -> dict[str, list[float]]:
    """Return by fault how long nobody's round ended, at the longest, from each until the next one or the run's end."""
    times = sorted(sight.at_s for sight in seen)
    found: dict[str, list[float]] = {}
    for this, following in itertools.pairwise([*struck, None]):
        assert this is not None
        until = times[-1] if following is None else following.at_s
        during = [max(before for before in times if before <= this.at_s)]
        during += [at for at in times if this.at_s < at < until]
        during += [min((at for at in times if at >= until), default=times[-1])]
        longest = max(b - max(a, this.at_s) for a, b in itertools.pairwise(during))
        found.setdefault(this.fault, []).append(longest)
    return found


def report(found: dict[str, list[float]]) -> Iterator[str]:
    for fault, seconds in sorted(found.items()):
        p90 = statistics.quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
        yield f"{len(seconds):4d} {fault}: no round for {statistics.median(seconds):.1f} s (median), {p90:.1f} s (p90)"


def test_nothing_hangs_and_survivors_agree(nodes: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, list[float]] = {}
    for seed in itertools.count():
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_run(run_of(RULES[seed % len(RULES)], folder), folder / "run.toml")
        storm, training = (
            NodeStorm(nodes, NODES, folder, seed),
            nodes.begin_training(folder / "run.toml", folder / "out"),
        )
        storm.pass_over(training, int(CALM_SHARE * STEPS / PERIOD))
        assert training.returncode == 0, f"{(folder / 'out.log').read_text()}\nafter {storm.struck[-10:]}"
        records, seen = list(read_journal(folder / "out" / "journal.jsonl")), list(sights(folder))
        verify(records)
        assert require_agreement(records, seen) > STEPS // PERIOD // 2
        for fault, seconds in stalls(storm.struck, seen).items():
            found.setdefault(fault, []).extend(seconds)
        with capsys.disabled():
            print(f"\n{sum(map(len, found.values()))} faults", *report(found), sep="\n")
        if sum(map(len, found.values())) >= FAULTS:
            break
