"""A thousand faults on a real Ray of several nodes: nothing hangs, survivors agree, and no sample is lost.

    make chaos

Takes hours, and needs root and a C compiler. The variable DECENTRAL_CHAOS_FAULTS asks for fewer faults, and
DECENTRAL_CHAOS_SEED for another first seed: a run whose seed failed is repeated with that one.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from decentral.checkpoint import Storage, load, newest
from decentral.config import Run, validated, write_run
from decentral.coverage import coverage
from decentral.journal import Joined, Record, read_journal
from decentral.replica import held_out
from decentral.sim.simulate import simulate
from decentral.verify import verify
from tests.chaos import clocks
from tests.chaos.agreement import require_agreement
from tests.chaos.clocks import Clocks
from tests.chaos.disk import disk
from tests.chaos.faults import FULL_MBIT, Faults, Site
from tests.chaos.nodes import NodeStorm, Struck
from tests.chaos.witness import Sight, sights
from tests.worlds.fidelity import namespaces

pytestmark = pytest.mark.chaos

FAULTS = int(os.environ.get("DECENTRAL_CHAOS_FAULTS", "1000"))
FIRST_SEED = int(os.environ.get("DECENTRAL_CHAOS_SEED", "0"))
NODES, WORKERS = 6, 5
EPOCH, EPOCHS = 2048, 16
CALM_SHARE = 0.9
"""Nothing is broken any more once so much of the samples is settled."""
STEP_S = 0.01
CLOSE = 1.02
"""How many times the loss of a quiet run on the same samples the loss may be, or the other way round."""
WITNESSED = "tests.chaos.witness:Witnessed"
RULES: list[dict[str, Any]] = [
    {"rule": {"name": WITNESSED + "DiLoCo", "period": 4, "codec": "int8"}, "inner": {"name": "sgd", "lr": 0.007}},
    {"rule": {"name": WITNESSED + "LocalSGD", "period": 4}, "inner": {"name": "sgd", "lr": 0.05}},
]


def run_of(parts: dict[str, Any], folder: Path, epochs: int = EPOCHS, **fields: Any) -> Run:
    return validated(
        {
            "steps": EPOCH * EPOCHS,  # the epochs end first
            "batch_size": 2,
            "leases": True,
            "epochs": epochs,
            "evaluate_every": 0,
            "patience_s": 10.0,
            "inner": parts["inner"],
            "rule": {**parts["rule"], "folder": str(folder)},
            "fleet": {"workers": [{"count": WORKERS}]},
            "task": {"name": "tests.chaos.tasks:PacedRegression", "epoch": EPOCH},
            **fields,
        },
        "chaos",
    )


def stormy_run_of(parts: dict[str, Any], folder: Path, checkpoints: Path) -> Run:
    task = {"name": "tests.chaos.tasks:PacedRegression", "epoch": EPOCH, "step_s": STEP_S}
    return run_of(parts, folder, task=task, checkpoint={"url": str(checkpoints), "every_s": 2.0})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := namespaces.why_not() or clocks.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    made = Clocks(folder, NODES)
    with disk(folder / "disk") as mounted, namespaces.cluster(NODES, made.environment) as cluster:
        cluster.limit(FULL_MBIT)
        yield Site(cluster, made, mounted)


@lru_cache
def quiet_losses(number: int, folder: Path) -> tuple[float, float]:
    """Return the held-out loss of a run in which nothing happens, and of one that ends after half of the samples."""
    whole, half = (simulate(run_of(RULES[number], folder, epochs)).after["loss"] for epochs in (EPOCHS, EPOCHS // 2))
    return whole, half


def require_loss(number: int, run: Run, model: Path, folder: Path) -> float:
    """Require the loss of a quiet run on the same samples; return how many times that it is."""
    whole, half = quiet_losses(number, folder)
    assert half > CLOSE * whole  # so whoever has lost half of its work is found out
    (params,) = load_file(model).values()
    ratio: float = held_out(run.make_task(), run.seed, params.flatten())["loss"] / whole
    assert 1 / CLOSE < ratio < CLOSE
    return ratio


def require_samples(records: list[Record]) -> int:
    """Require that each sample was trained on, and that this was not lost; return how many were more than once."""
    found = coverage(records)
    assert (found.samples, found.missing) == (EPOCH * EPOCHS, ())
    return sum(repeat.stop - repeat.start for repeat in found.repeated)


def require_checkpoint(checkpoints: Path, faults: Faults) -> None:
    """Require that the last whole checkpoint was always there, and that one is whole now."""
    assert faults.lost == []
    storage = Storage(str(checkpoints))
    found = newest(storage)
    assert found is not None
    for worker in range(WORKERS):
        load(storage, found, worker)


def stalls(struck: list[Struck], seen: list[Sight]) -> dict[str, list[float]]:
    """Return by fault how long nobody's round ended, at the longest, from each until the next one or the run's end."""
    times = sorted(sight.at_s for sight in seen)
    found: dict[str, list[float]] = {}
    for this, following in itertools.pairwise([*struck, None]):
        assert this is not None
        if this.at_s < times[0]:  # it struck before the first round of all
            continue
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


def test_nothing_hangs_and_survivors_agree(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, list[float]] = {}
    for seed in itertools.count(FIRST_SEED):
        number = seed % len(RULES)
        folder, checkpoints = tmp_path / str(seed), site.disk.folder / str(seed)
        folder.mkdir()
        run = stormy_run_of(RULES[number], folder, checkpoints)
        write_run(run, folder / "run.toml")
        faults = Faults(site, checkpoints)
        storm = NodeStorm(faults, NODES, WORKERS, folder, folder / "out" / "journal.jsonl", seed)
        training = site.cluster.begin_training(folder / "run.toml", folder / "out")
        storm.pass_over(training, int(CALM_SHARE * EPOCH * EPOCHS))
        assert training.returncode == 0, f"{(folder / 'out.log').read_text()}\nafter {storm.struck[-10:]}"
        records, seen = list(read_journal(folder / "out" / "journal.jsonl")), list(sights(folder))
        verify(records)
        rounds = require_agreement(records, seen)
        repeated = require_samples(records)
        ratio = require_loss(number, run, folder / "out" / "model.safetensors", tmp_path)
        require_checkpoint(checkpoints, faults)
        shutil.rmtree(checkpoints)
        for fault, seconds in stalls(storm.struck, seen).items():
            found.setdefault(fault, []).extend(seconds)
        newcomers = sum(isinstance(record, Joined) for record in records) - WORKERS
        with capsys.disabled():
            print(
                f"\nseed {seed}: {len(storm.struck)} faults in {storm.struck[-1].at_s - storm.struck[0].at_s:.0f} s, "
                f"{newcomers} newcomers, {rounds} rounds came to a mean, {repeated} of {EPOCH * EPOCHS} samples "
                f"trained on again, a full disk met {faults.torn} checkpoints, the loss is {ratio:.4f} of a quiet one",
                f"{sum(map(len, found.values()))} faults",
                *report(found),
                sep="\n",
            )
        if sum(map(len, found.values())) >= FAULTS:
            break
