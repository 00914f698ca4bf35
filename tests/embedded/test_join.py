"""Processes with loops of their own, joined over real sockets."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import loop, optimizer_of
from processes import LONG_S, Crew, event, flat, free_address, vector
from sockets import train_here
from torch import nn

import decentral
from decentral.config import Run, validated
from decentral.errors import RunError
from decentral.journal import Left, Synced, read_journal
from decentral.peer import Peer
from decentral.protocols import DiLoCo, LocalSGD, SyncRule
from decentral.replica import initial_model
from decentral.report.page import page, read_runs

STEPS = 10


def run_of(rule: SyncRule, workers: int, steps: int = STEPS) -> Run:
    return validated(
        {
            "steps": steps,
            "batch_size": 4,
            "evaluate_every": 0,
            "task": {"name": "quadratic", "dimension": 1003, "noise": 0.1},
            "rule": rule,
            "inner": {"name": "adamw", "lr": 0.01},
            "fleet": {"workers": [{"count": workers}]},
        },
        "test",
    )


def joined(place: dict[str, Any], _tell: Any, run: Run) -> list[float]:
    """Train as the run says; return the parameters."""
    model = initial_model(run.make_task(), run.seed)
    optimizer = optimizer_of(run, model)
    with decentral.join(run, **place) as fleet:
        sync = fleet.attach(model, optimizer)
        loop(run, fleet.worker, model, optimizer, sync.step, run.steps)
        assert not sync.step(), "the run is over"
    return flat(model)


def test_processes_come_to_the_bits_of_a_run_on_workers(tmp_path: Path) -> None:
    run = run_of(DiLoCo(period=3), workers=2)
    with Crew(joined, 2, run) as crew:
        crew.start(0, out=tmp_path)
        crew.start(1)
        ended = crew.answers()
    shown = page(read_runs([tmp_path]))
    assert "diloco on OwnLoop" in shown
    assert "Finished." in shown
    assert "There is no summary" not in shown
    expected = train_here(run)
    assert [params.tolist() for params in expected.params.values()] == ended
    left = [record for record in read_journal(tmp_path / "journal.jsonl") if isinstance(record, Left)]
    assert sorted((record.worker, record.reason, record.step, record.sent_bytes) for record in left) == [
        (record.worker, "finished", STEPS, record.sent_bytes) for record in expected.left()
    ]


class Breaks(Exception):
    """What a loop raises."""


def broken(place: dict[str, Any], _tell: Any, run: Run, error: type[BaseException]) -> list[float] | str:
    """As `joined`, but worker 0's loop breaks in the midst of its second phase; return what has come out of it then."""
    model = initial_model(run.make_task(), run.seed)
    optimizer = optimizer_of(run, model)
    try:
        with decentral.join(run, **place) as fleet:
            sync = fleet.attach(model, optimizer)
            if fleet.worker == 0:
                loop(run, 0, model, optimizer, sync.step, 4)
                raise error
            loop(run, fleet.worker, model, optimizer, sync.step, run.steps)
    except error as raised:
        return type(raised).__name__
    return flat(model)


@pytest.mark.parametrize("error", [Breaks, KeyboardInterrupt])
def test_a_loop_that_breaks_leaves_the_others_to_go_on(error: type[BaseException], tmp_path: Path) -> None:
    """Worker 0 serves the coordinator for the others until they are done, and what has broken its loop comes then."""
    with Crew(broken, 3, run_of(DiLoCo(period=3), 3), error) as crew:
        crew.start(0, out=tmp_path)
        crew.start(1, 2)
        first, *others = crew.answers()
    assert first == error.__name__
    assert others[0] == others[1]
    left = {record.worker: record for record in read_journal(tmp_path / "journal.jsonl") if isinstance(record, Left)}
    assert [left[worker].reason for worker in range(3)] == [f"failed: {error.__name__}", "finished", "finished"]
    assert [left[worker].step for worker in range(3)] == [3, STEPS, STEPS]


class Fails(LocalSGD):
    """A rule that raises after its first round."""

    async def run(self, peer: Peer) -> None:
        await peer.train(3)
        await self.agreed_mean(peer, peer.params)
        raise ValueError("no more")


def failing(place: dict[str, Any], _tell: Any, run: Run) -> int:
    """Return the loop's step in which the rule's error came."""
    model = initial_model(run.make_task(), run.seed)
    optimizer = optimizer_of(run, model)
    steps = []
    try:
        with decentral.join(run, rule=Fails(), **place) as fleet:
            sync = fleet.attach(model, optimizer)
            loop(run, fleet.worker, model, optimizer, lambda: steps.append(0) or sync.step(), run.steps)
    except ValueError:
        return len(steps)
    return -1


def test_what_a_rule_raises_is_raised_by_the_loops_next_step() -> None:
    with Crew(failing, 2, run_of(DiLoCo(), 2)) as crew:
        crew.start(0, 1)
        assert crew.answers() == [3, 3]


def left_behind(place: dict[str, Any], tell: Any, run: Run) -> str:
    """Tell of the first round; return what the loop ends with."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        with decentral.join(run, **place) as fleet:
            sync = fleet.attach(model, optimizer)
            while sync.step():
                if sync.steps == 3:
                    tell("a round")
    except RunError as error:
        return str(error)
    return "it went on"


def test_who_serves_the_coordinator_and_is_killed_ends_the_others_run() -> None:
    run = validated({"rule": DiLoCo(period=3), "real": {"start_timeout_s": 1.0}}, "test")
    with Crew(left_behind, 2, run) as crew:
        crew.start(0, 1)
        for worker, _ in crew.heard():
            if worker == 1:
                crew.processes.pop(0).kill()
        (words,) = crew.answers()
    assert re.search(r"the coordinator at .* did not answer '\w+' within 1 s", words)


def endless(place: dict[str, Any], tell: Any, run: Run, comes: Any, enough: Any) -> int:
    """Tell at the end of each phase where the worker is, until it is `enough`; return the steps done.

    The first life of worker 2 stays in the midst of its third phase. At step 30 the others wait until its second life
    `comes`, for loops as short as these leave a new process no time to begin.
    """
    tell("I come")
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    chance = torch.Generator().manual_seed(place["worker"])

    def describe() -> None:
        parameters = list(model.parameters())
        means = [optimizer.state[each][name] for each in parameters for name in ("exp_avg", "exp_avg_sq")]
        counted = {int(optimizer.state[each]["step"]) for each in parameters}
        tell((sync.steps, flat(model), vector(means).tolist(), counted))

    with decentral.join(run, **place) as fleet:
        sync = fleet.attach(model, optimizer)
        came_later = sync.steps > 0
        if came_later:
            describe()
        while not enough.is_set():
            optimizer.zero_grad()
            model(torch.randn(2, 4, generator=chance)).square().sum().backward()
            optimizer.step()
            sync.step()
            if fleet.worker == 2 and sync.steps == 7 and not came_later:
                tell("here I stay")
                signal.pause()
            if sync.steps == 30:
                comes.wait()
            if sync.steps % 3 == 0:
                describe()
    return sync.steps


def test_who_is_killed_is_missed_and_who_comes_again_has_what_the_others_have(tmp_path: Path) -> None:
    run, comes, enough = Run(rule=DiLoCo(period=3), patience_s=20), event(), event()
    hosts: list[Any] = []
    newcomer: list[Any] = []
    with Crew(endless, 3, run, comes, enough) as crew:
        crew.start(0, out=tmp_path)
        crew.start(1, 2)
        lives = 1
        for worker, word in crew.heard():
            if word == "here I stay":
                crew.processes[2].kill()
                crew.processes[2].join()
                crew.start(2)
                lives = 2
            elif word == "I come":
                if lives == 2:
                    comes.set()
            elif worker != 2:
                hosts.append(word)
            elif lives == 2 and word[0] > 6:
                newcomer.append(word)
            if len(newcomer) == 4:
                enough.set()
        steps = crew.answers()
    step, params, *means = newcomer[0]
    assert any(word[:2] == (step, params) for word in hosts), "its parameters are nobody's"
    assert any(word[2:] == tuple(means) for word in hosts), "its optimizer's means are nobody's"
    assert all(each > step for each in steps)
    journal = list(read_journal(tmp_path / "journal.jsonl"))
    left = {record.worker: record.reason for record in journal if isinstance(record, Left)}
    assert left == dict.fromkeys(range(3), "finished")
    parties = [record.members for record in journal if isinstance(record, Synced) and record.worker == 0]
    assert parties.index((0, 1)) > parties.index((0, 1, 2)), "nobody was missed"
    assert (0, 1, 2) in parties[parties.index((0, 1)) :], "who came again was left out"


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
import torch, decentral
from decentral.protocols import LocalSGD

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with decentral.join(rule=LocalSGD(period=2), worker=0, workers=1, address="127.0.0.1:{port}", secret="s" * 16) as fleet:
    sync = fleet.attach(model, optimizer)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        sync.step()
print(sync.steps)
"""


def test_nothing_of_it_needs_ray() -> None:
    program = WITHOUT_RAY.replace("{port}", free_address().rpartition(":")[2])
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=12 * LONG_S)
    assert (shown.stdout, shown.returncode) == ("3\n", 0), shown.stderr
