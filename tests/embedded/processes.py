"""Processes that join a run, each forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["decentral.embedded.join", "processes"])

SECRET = "of-the-tests-that-join-a-run"
LONG_S = 20.0
"""Nothing here takes so long."""

WHOLE_LINES = {"PYTHONUNBUFFERED": ""}
"""For programs that print into one pipe: unbuffered, a line and its end are written apart, and lines get mixed."""

torch.set_num_threads(1)
torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # the first one imports torch's compiler: once for all processes
event = _CONTEXT.Event


def free_address() -> str:
    """Return an address of this machine at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@dataclass
class Failure:
    """What a worker has raised."""

    trace: str


class Crew:
    """Workers of one run, a process each, with a pipe of its own each; those that are left are killed at the end."""

    def __init__(self, body: Callable[..., Any], workers: int, *arguments: Any, long_s: float = LONG_S) -> None:
        """A worker does `body(place, tell, *arguments)`: `place` are arguments of `join`, what it tells is `heard`."""
        self._long_s = long_s
        self._body, self._workers, self._arguments = body, workers, arguments
        self._address = free_address()
        self._lines: dict[Any, int] = {}
        self._answers: dict[int, Any] = {}
        self.processes: dict[int, BaseProcess] = {}

    def start(self, *numbers: int, **more: Any) -> None:
        for worker in numbers:
            place = {"worker": worker, "workers": self._workers, "address": self._address, "secret": SECRET, **more}
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            self.processes[worker] = _CONTEXT.Process(
                target=_work, args=(theirs, self._body, place, self._arguments), daemon=True
            )
            self.processes[worker].start()
            theirs.close()
            self._lines[ours] = worker

    def heard(self) -> Iterator[tuple[int, Any]]:
        """Yield (worker, word) as words come, until all workers have returned or died."""
        while self._lines:
            ready = wait(list(self._lines), self._long_s)
            assert ready, f"nobody has told anything for {self._long_s} s"
            for line in ready:
                worker = self._lines[line]
                try:
                    is_answer, word = line.recv()
                except EOFError:
                    del self._lines[line]
                    continue
                assert not isinstance(word, Failure), f"worker {worker}: {word.trace}"
                if is_answer:
                    self._answers[worker] = word
                else:
                    yield worker, word

    def answers(self) -> list[Any]:
        """Return what the workers have returned, in order of workers."""
        for _ in self.heard():
            pass
        return [self._answers[worker] for worker in sorted(self.processes)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


def _work(line: Any, body: Callable[..., Any], place: dict[str, Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        answer = body(place, lambda word: line.send((False, word)), *arguments)
    except BaseException:
        answer = Failure(traceback.format_exc())
    line.send((True, answer))


def flat(model: nn.Module) -> list[float]:
    """Return the parameters one after the other, exactly."""
    return vector(list(model.parameters())).tolist()


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().view(-1) for tensor in tensors])
