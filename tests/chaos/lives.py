"""A worker of a real run as a process of its own, forked and without Ray: a life begins in a hundredth of a second."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import torch

from decentral.config import validated
from decentral.errors import DecentralError
from decentral.workers.rpc import Keys
from decentral.workers.worker import Place, live

KEYS = Keys("the run's secret of these tests")
HOST = "127.0.0.1"


class Life:
    """The `number`-th process that is worker `worker`."""

    def __init__(self, table: dict[str, Any], worker: int, number: int, coordinator: str, folder: Path) -> None:
        self.worker, self.number = worker, number
        self._end = folder / f"{worker}-{number}.end"
        self._stacks = folder / f"{worker}-{number}.stacks"
        arguments = (table, worker, number, coordinator, folder, self._end, self._stacks)
        self.process: BaseProcess = _CONTEXT.Process(target=_live, args=arguments, daemon=True)
        self.process.start()

    def __repr__(self) -> str:
        return f"life {self.number} of worker {self.worker} (process {self.process.pid})"

    @property
    def is_over(self) -> bool:
        return not self.process.is_alive()

    @property
    def end(self) -> str:
        """How it ended by itself: "finished", another reason to leave, or an error. Empty if it was killed."""
        return self._end.read_text() if self._end.exists() else ""

    @property
    def stacks(self) -> str:
        """Where its tasks stood when it was asked with SIGUSR1."""
        return self._stacks.read_text() if self._stacks.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        if not self.is_over:
            os.kill(self.process.pid or 0, number)


def _live(
    table: dict[str, Any], worker: int, number: int, coordinator: str, folder: Path, end: Path, stacks: Path
) -> None:
    torch.set_num_threads(1)
    run = validated(table, "chaos")
    place = Place(coordinator, KEYS, HOST, torch.device("cpu"))

    async def live_and_tell() -> None:
        loop = asyncio.get_running_loop()
        with stacks.open("w") as file:
            loop.add_signal_handler(signal.SIGUSR1, _tell_stacks, file)
            peer, reason = await live(run, worker, number, place)
        if reason == "finished":
            (folder / f"{worker}.params").write_bytes(peer.params.numpy().tobytes())
        end.write_text(reason)

    try:
        asyncio.run(live_and_tell())
    except DecentralError as error:
        end.write_text(f"{type(error).__name__}: {error}")


def _tell_stacks(file: TextIO) -> None:
    for task in asyncio.all_tasks():
        task.print_stack(file=file)
    file.flush()


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.chaos.warm"])
