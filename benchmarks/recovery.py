"""How long survivors stand when a worker is killed in mid-round: ours on a real Ray, and two peers beside it.

Run from the repository's root (about two minutes; with peers about eight):

    python -m benchmarks.recovery [--kills 10] [--beside torchft hivemind]

Four workers train with DiLoCo. In every 25th round, if all take part, one of them kills itself with SIGKILL while
its contribution is on the way; the others reduce again without it, and it comes back as a newcomer. Measured is the
time from the kill until the last of the survivors begins its next local step.

torchft's DiLoCo does the same, its killed replica is started again at once; with its lighthouse as its README starts it
(which waits 10 s for replicas to join, and 5 s for a heartbeat), and with a second for each. hivemind's averager does
local SGD, with its own timeouts, and is waited for `HANG_S` seconds after one kill. Their environments: see
`benchmarks.peers`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.peers import python_of
from decentral.config import validated
from decentral.peer import Peer
from decentral.protocols import DiLoCo
from decentral.protocols.rounds import Round
from decentral.tasks import Quadratic
from decentral.workers.launch import train

WORKERS = 4
PARAMETERS = 250_000
STEP_S = 0.02
PERIOD = 10
EVERY = 25
"""Rounds between two kills."""
SENDING_S = 0.005
"""Seconds after which a worker kills itself that has begun to send."""


class Paced(Quadratic):
    """A quadratic each of whose steps takes a stated time."""

    name: ClassVar[str] = ""

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        time.sleep(STEP_S)
        return super().batch(worker, start, size)


class Struck(DiLoCo):
    """DiLoCo whose workers kill themselves in turn; they note when, and when they train."""

    folder: Path

    async def run(self, peer: Peer) -> None:
        peer.keepers.append(_Notes(self.folder / f"rests-{peer.id}-{os.getpid()}"))
        await super().run(peer)

    def begin(self, peer: Peer, *arguments: Any, **options: Any) -> Round:
        round_ = super().begin(peer, *arguments, **options)
        turn = round_.number // EVERY
        if round_.number % EVERY == 0 and len(peer.members) == WORKERS and peer.id == turn % WORKERS:
            asyncio.get_running_loop().call_later(SENDING_S, _die, self.folder / f"death-{turn}")
        return round_


class _Notes:
    """Notes in a file when a worker is at rest, about to train."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def rest(self) -> None:
        os.write(self._file, f"{time.monotonic()}\n".encode())


def _die(note: Path) -> None:
    note.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def recoveries(folder: Path) -> list[float]:
    """Return for each death the seconds until the last of the survivors trained again, in order of deaths."""
    rests = {file: [float(line) for line in file.read_text().split()] for file in folder.glob("rests-*")}
    deaths = sorted(float(file.read_text()) for file in folder.glob("death-*"))
    seconds = []
    for death in deaths:
        survivors = [times for times in rests.values() if times and times[0] < death < times[-1]]
        seconds.append(max(min(at for at in times if at > death) - death for times in survivors))
    return seconds


def of_decentral(kills: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        run = validated(
            {
                "steps": _steps(kills),
                "batch_size": 1,
                "evaluate_every": 0,
                "task": {"name": "benchmarks.recovery:Paced", "dimension": PARAMETERS},
                "inner": {"name": "sgd", "lr": 0.001},
                "rule": {"name": "benchmarks.recovery:Struck", "period": PERIOD, "folder": folder},
                "fleet": {"workers": [{"count": WORKERS}]},
            },
            "recovery",
        )
        train(run)
        return recoveries(Path(folder))


def _steps(kills: int) -> int:
    return PERIOD * (EVERY * (kills + 1) - 1)


LIGHTHOUSE = """
import sys
from torchft.coordination import LighthouseServer
limits = dict(min_replicas={0}, quorum_tick_ms=100, join_timeout_ms={1}, heartbeat_timeout_ms={2})
server = LighthouseServer(bind="[::]:0", **limits)
print(server.address(), flush=True)
sys.stdin.read()
"""


def of_torchft(kills: int, join_ms: int, heartbeat_ms: int) -> list[float]:
    """Return as `recoveries`; whoever has not come to the end twice as late as without kills is ended."""
    python, script = python_of("torchft"), Path(__file__).parent / "peer" / "torchft_kill.py"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        log = stack.enter_context((Path(folder) / "log").open("wb"))
        lighthouse = subprocess.Popen(
            [str(python), "-c", LIGHTHOUSE.format(2, join_ms, heartbeat_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        stack.callback(lighthouse.kill)
        assert lighthouse.stdout is not None
        address = lighthouse.stdout.readline().decode().strip()
        figures = (WORKERS, PARAMETERS, STEP_S, PERIOD, EVERY, SENDING_S, _steps(kills), folder, address)

        def start(rank: int) -> subprocess.Popen[bytes]:
            begun = subprocess.Popen([str(python), str(script), str(rank), *map(str, figures)], stdout=log, stderr=log)
            stack.callback(begun.kill)
            return begun

        replicas = [start(rank) for rank in range(WORKERS)]
        until = time.monotonic() + 2 * _steps(kills) * STEP_S + kills * HANG_S
        while any(replica.poll() is None for replica in replicas) and time.monotonic() < until:
            time.sleep(0.05)
            for rank, replica in enumerate(replicas):
                if replica.poll() == -signal.SIGKILL:
                    replicas[rank] = start(rank)
        return recoveries(Path(folder))


HANG_S = 120.0
"""Seconds that a peer's survivors have."""
DEADLY = 3
"""hivemind's round in which one is killed: the first ones find each other."""


def of_hivemind() -> tuple[list[float], str]:
    """Return as `recoveries`, and what each survivor's averager said of the round."""
    python, script = python_of("hivemind"), Path(__file__).parent / "peer" / "hivemind_kill.py"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        figures = (WORKERS, PARAMETERS, STEP_S, PERIOD, DEADLY, SENDING_S, HANG_S, folder)
        peers: list[subprocess.Popen[bytes]] = []
        addresses: list[str] = []
        for rank in range(WORKERS):
            output = folder / f"out-{rank}"
            with output.open("wb") as out:  # its daemons outlive it, and would hold a pipe open
                command = [str(python), str(script), str(rank), *map(str, figures), *addresses]
                peers.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True))
            stack.callback(_end_session, peers[-1].pid)
            addresses = addresses or _until(lambda output=output: _first_list(output))
        for peer in peers:
            peer.wait(HANG_S * 3)
        said = [(folder / f"out-{rank}").read_text(errors="replace").splitlines()[-1] for rank in range(WORKERS - 1)]
        return recoveries(folder), "; ".join(said)


def _first_list(output: Path) -> list[str]:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("[")]
    return list(json.loads(lines[0])) if lines else []


def _until(found: Callable[[], list[str]]) -> list[str]:
    until = time.monotonic() + HANG_S
    while not (result := found()) and time.monotonic() < until:
        time.sleep(0.1)
    return result


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def show(who: str, seconds: list[float], kills: int) -> None:
    print(f"{who}: {' '.join(f'{each:.2f}' for each in seconds)}")
    if seconds:
        print(
            f"  {len(seconds)} of {kills} kills in mid-round; survivors train again after "
            f"{statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s at most",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--beside", nargs="*", default=[], choices=["torchft", "hivemind"])
    options = parser.parse_args()
    missing = [peer for peer in options.beside if python_of(peer) is None]
    if missing:
        parser.error(f"python -m benchmarks.peers {' '.join(missing)} makes their environments first")
    show("decentral", of_decentral(options.kills), options.kills)
    if "torchft" in options.beside:
        show("torchft, lighthouse as in its README", of_torchft(options.kills, 10_000, 5_000), options.kills)
        show("torchft, a second for each", of_torchft(options.kills, 1_000, 1_000), options.kills)
    if "hivemind" in options.beside:
        seconds, said = of_hivemind()
        show(f"hivemind, waited for {HANG_S:g} s ({said})", seconds, 1)


if __name__ == "__main__":
    main()
