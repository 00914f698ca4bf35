"""decentral beside torchft, hivemind, EXO Gym and Flower: one GPT, the same samples, quiet and with one replica killed.

    python -m benchmarks.peers torchft hivemind exogym flower
    python -m benchmarks.side_by_side [--systems decentral torchft ...] [--replicas 2 4]      (root; twenty minutes)

A byte GPT of 859,136 parameters, 120 steps of 4 rows on each replica, AdamW, a round every 10 steps: DiLoCo (outer SGD,
0.7, Nesterov 0.9) where a system has it; hivemind has no outer optimiser and averages parameters, Flower's FedAvgM has
momentum without Nesterov. One thread for each replica, all on one machine, with the timeouts it comes with.

Each system runs in a network namespace of its own, whose loopback counts what is sent: control traffic, Ray's too, and
what a system's processes hand each other on one machine are in it. `ms a step` is from the first local step to the last
one, rounds included; `s` is the whole command. Killed is the last replica, with SIGKILL, when it has done half of its
steps; the survivors' longest stop after that is from one local step to the next. What a system does not start again by
itself stays away.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.peers import python_of
from benchmarks.recovery import LIGHTHOUSE
from decentral.config import validated
from decentral.task import Task
from decentral.workers.launch import train

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "peer"))  # the peers' environments know these modules by their plain names

import side  # noqa: E402
import work  # noqa: E402

LIMIT_S = 240.0
"""How long a system has, from its start to its end."""


@dataclass
class Told:
    """What one run came to; None where it did not come that far."""

    seconds: float | None
    step_ms: float | None
    megabytes: float
    loss: float | None
    stop_s: float | None
    finished: int


class Work(Task):
    """The same work as a task."""

    name: ClassVar[str] = ""

    replicas: int
    folder: Path

    def model(self) -> nn.Module:
        return work.model_of("gpt")

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, ...]:
        with (self.folder / f"steps-{worker}-{os.getpid()}").open("ab", buffering=0) as notes:
            side.note_step(notes.fileno())
        rows = torch.arange(start, start + size) * self.replicas + worker
        return (_samples(self.replicas)[rows],)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss: Tensor = model(batch[0])
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": side.held_out_loss(model)}


_made: dict[int, Tensor] = {}


def _samples(replicas: int) -> Tensor:
    if replicas not in _made:
        (_made[replicas],) = work.data_of("gpt", side.STEPS * work.BATCH["gpt"] * replicas, seed=3)
    return _made[replicas]


def run_decentral(replicas: int, folder: Path, codec: str) -> None:
    run = validated(
        {
            "steps": side.STEPS,
            "batch_size": work.BATCH["gpt"],
            "evaluate_every": 0,
            "task": {"name": "benchmarks.side_by_side:Work", "replicas": replicas, "folder": str(folder)},
            "inner": {"name": "adamw", "lr": work.LR["gpt"], "weight_decay": 0.01, "betas": (0.9, 0.999)},
            "rule": {"name": "diloco", "period": side.PERIOD, "codec": codec},
            "fleet": {"workers": [{"count": replicas}]},
        },
        "side_by_side",
    )
    outcome = train(run)
    for left in outcome.left():
        if left.reason == "finished":
            side.note_end(folder, left.worker, outcome.after["loss"])


def run_torchft(replicas: int, folder: Path) -> None:
    python = str(python_of("torchft"))
    with ExitStack() as stack:
        command = [python, "-c", LIGHTHOUSE.format(1, 10_000, 5_000)]  # as its README starts it
        lighthouse = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(lighthouse.kill)
        assert lighthouse.stdout is not None
        address = lighthouse.stdout.readline().decode().strip()
        script = str(HERE / "peer" / "torchft_side.py")
        _all([[python, script, str(rank), str(replicas), str(folder), address] for rank in range(replicas)])


def run_hivemind(replicas: int, folder: Path) -> None:
    python, script = str(python_of("hivemind")), str(HERE / "peer" / "hivemind_side.py")
    first = folder / "out"
    command = [python, script, "0", str(replicas), str(folder)]
    with first.open("wb") as out, subprocess.Popen(command, stdout=out) as leader:
        while not (lines := [line for line in first.read_text().splitlines() if line.startswith("[")]):
            time.sleep(0.05)
        addresses = json.loads(lines[0])
        _all([[python, script, str(rank), str(replicas), str(folder), *addresses] for rank in range(1, replicas)])
        leader.wait()


def run_exogym(replicas: int, folder: Path) -> None:
    _all([[str(python_of("exogym")), str(HERE / "peer" / "exogym_side.py"), str(replicas), str(folder)]])


FLOWER_APP = """
[project]
name = "side"
version = "1.0.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "side"
[tool.flwr.app.components]
serverapp = "flower_side:server"
clientapp = "flower_side:client"
[tool.flwr.app.config]
folder = "{folder}"
replicas = {replicas}
"""
FLOWER_LINK = '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:8000"\ninsecure = true\n'


def run_flower(replicas: int, folder: Path) -> None:
    python = python_of("flower")
    assert python is not None
    app, home = folder / "app", folder / "home"
    app.mkdir()
    home.mkdir()
    for name in ("side", "work", "flower_side"):
        shutil.copy(HERE / "peer" / f"{name}.py", app)
    (app / "pyproject.toml").write_text(FLOWER_APP.format(folder=folder, replicas=replicas))
    (home / "config.toml").write_text(FLOWER_LINK)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}

    def start(command: str, *arguments: str) -> subprocess.Popen[bytes]:
        whole = [str(python.parent / command), *arguments]
        return subprocess.Popen(whole, env=environment, stdout=sys.stderr, start_new_session=True)

    start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1")
    for rank in range(replicas):
        node = f"partition-id={rank} num-partitions={replicas}"
        port = str(9094 + rank)
        begun = start(
            "flower-supernode", "--insecure", "--superlink", "127.0.0.1:8000", "--port", port, "--node-config", node
        )
        (folder / f"machine-{rank}").write_text(str(begun.pid))
    while start("flwr", "run", str(app), "here").wait():  # until its server answers
        time.sleep(0.2)
    while not (folder / "end-0").exists():
        time.sleep(0.05)


SYSTEMS: dict[str, tuple[str, Callable[[int, Path], None]]] = {
    "decentral": ("DiLoCo", lambda replicas, folder: run_decentral(replicas, folder, "float32")),
    "decentral-int8": ("DiLoCo, int8", lambda replicas, folder: run_decentral(replicas, folder, "int8")),
    "torchft": ("DiLoCo", run_torchft),
    "hivemind": ("local SGD", run_hivemind),
    "exogym": ("DiLoCo", run_exogym),
    "flower": ("FedAvgM", run_flower),
}


def _all(commands: list[list[str]]) -> None:
    """Start all, and wait until all have ended, however they do."""
    begun = [subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) for command in commands]
    for process in begun:
        process.wait()


def steps_of(folder: Path) -> dict[int, list[float]]:
    """Return for each rank when its steps began, whatever processes it had."""
    steps: dict[int, list[float]] = {}
    for file in folder.glob("steps-*"):
        steps.setdefault(int(file.name.split("-")[1]), []).extend(map(float, file.read_text().split()))
    return {rank: sorted(times) for rank, times in steps.items()}


def strike(folder: Path, rank: int) -> None:
    """Kill that rank's machine when it has done half its steps, and note when."""
    while len(steps_of(folder).get(rank, ())) <= side.STEPS // 2:
        time.sleep(0.01)
    machine = folder / f"machine-{rank}"
    if machine.exists():  # its session: whatever it started goes with it
        victim, kill = int(machine.read_text()), os.killpg
    else:
        newest = max(folder.glob(f"steps-{rank}-*"), key=lambda file: file.stat().st_mtime)
        victim, kill = int(newest.name.split("-")[2]), os.kill
    (folder / "death").write_text(str(time.monotonic()))
    kill(victim, signal.SIGKILL)


def loopback_bytes() -> int:
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def told(folder: Path, seconds: float | None) -> Told:
    steps = steps_of(folder)
    ends = [json.loads(file.read_text()) for file in sorted(folder.glob("end-*"))]
    killed = (folder / "death").exists()
    survivors = [times for rank, times in steps.items() if not killed or rank != max(steps)]
    whole = [times for times in survivors if len(times) >= side.STEPS]
    stop_s = None
    if killed:
        death = float((folder / "death").read_text())
        stops = [[b - a for a, b in itertools.pairwise(times) if b > death] for times in whole]
        stop_s = max(map(max, stops)) if len(whole) == len(survivors) else None
    return Told(
        seconds=seconds,
        step_ms=max(1000 * (times[-1] - times[0]) / (len(times) - 1) for times in whole) if whole else None,
        megabytes=loopback_bytes() / 1e6,
        loss=statistics.mean(ends) if ends else None,
        stop_s=stop_s,
        finished=len(ends),
    )


def one(system: str, replicas: int, killed: bool) -> None:
    """Run one system in this process's own namespaces and print what it came to; end whatever it left."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if killed:
            threading.Thread(target=strike, args=(folder, replicas - 1), daemon=True).start()
        began = time.monotonic()
        _, run = SYSTEMS[system]
        ended, out = threading.Event(), sys.stdout

        def finish(seconds: float | None) -> None:
            print(json.dumps(asdict(told(folder, seconds))), file=out, flush=True)
            os._exit(0)  # the process namespace goes with its first process

        def watch() -> None:
            if not ended.wait(LIMIT_S):
                finish(None)

        threading.Thread(target=watch, daemon=True).start()
        with contextlib.redirect_stdout(sys.stderr):
            run(replicas, folder)
        ended.set()
        finish(time.monotonic() - began)


def apart(system: str, replicas: int, killed: bool) -> Told:
    """Return what `one` says in network and process namespaces of its own."""
    command = [
        "unshare",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-m",
        __spec__.name,
    ]
    command += ["--one", system, str(replicas), str(int(killed))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    return Told(**json.loads(lines[-1]))


def rows(systems: list[str], replicas: list[int]) -> Iterator[tuple[str, ...]]:
    def said(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for system in systems:
        for count in replicas:
            quiet, killed = apart(system, count, killed=False), apart(system, count, killed=True)
            yield (
                system,
                SYSTEMS[system][0],
                str(count),
                said(quiet.seconds, ".1f"),
                said(quiet.step_ms, ".0f"),
                f"{quiet.megabytes / count / (side.STEPS // side.PERIOD):.1f}",
                said(quiet.loss, ".3f"),
                said(killed.stop_s, ".1f"),
                str(killed.finished),
                said(killed.loss, ".3f"),
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        system, count, killed = options.one
        one(system, int(count), bool(int(killed)))
    missing = [s for s in options.systems if not s.startswith("decentral") and python_of(s) is None]
    if missing:
        parser.error(f"python -m benchmarks.peers {' '.join(missing)} makes their environments first")
    table = Table(
        "system",
        "rule",
        "replicas",
        "s",
        "ms a step",
        "MB a replica and round",
        "loss",
        "stop, s",
        "ended",
        "loss then",
    )
    for row in rows(options.systems, options.replicas):
        table.add_row(*row)
        Console().print(*row, sep="  ")
    Console().print(table)


if __name__ == "__main__":
    main()
