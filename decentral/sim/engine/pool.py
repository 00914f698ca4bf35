"""Processes that compute for the simulation: each works through the calls for its own replicas, in their order.

The processes are forked, so they have the replicas, the task and its data without any of it being sent; parameters and
what else the simulation looks at lie in an `Arena`. A replica is always served by the same process: whatever a model
or an optimiser remembers elsewhere stays in one place, and the results do not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from decentral.errors import DecentralError, RunError
from decentral.replica import TorchReplica

AHEAD = 16
"""Calls that a process is sent before it has answered the first: it need not wait for us, and no pipe is ever full."""
READY_S = 30
"""Seconds until a process must have begun: what other threads held when it was forked, it can never have."""

Work = Callable[..., Any]
"""A function of a module, called with a replica and plain values."""


class Call:
    """Work handed in to a pool; `result` waits for it."""

    def __init__(self, pool: Pool, worker: int, work: Work, args: tuple[Any, ...]) -> None:
        self._pool = pool
        self.order = (worker, work, args)
        self.answer: tuple[Any, Exception | None] | None = None

    def result(self) -> Any:
        """Return what the work returned; raises what it raised, `RunError` if its process has died."""
        while self.answer is None:
            self._pool.await_answers()
        value, error = self.answer
        if error is not None:
            raise error
        return value


class Pool:
    """So many processes, each with every `processes`-th replica. Close it; do not fork it."""

    def __init__(self, replicas: Sequence[TorchReplica], processes: int) -> None:
        """Fork the processes. Raises `RunError` if a process forked from this one cannot compute gradients."""
        self._links: list[_Link] = []
        try:
            for _ in range(processes):
                self._links.append(_Link(replicas))
            for link in self._links:
                link.require_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, worker: int, work: Work, *args: Any) -> Call:
        """Have `work(replicas[worker], *args)` computed after what has been submitted for this worker before."""
        call = Call(self, worker, work, args)
        link = self._links[worker % len(self._links)]
        link.waiting.append(call)
        link.send()
        return call

    def await_answers(self) -> None:
        """Wait until at least one process has answered; see to it that all have something to do."""
        links = {link.connection: link for link in self._links if link.sent}
        for connection in wait(list(links)):
            links[connection].take_answer()  # type: ignore[index]  # we asked for connections alone

    def close(self) -> None:
        """End the processes, whatever they do."""
        for link in self._links:
            link.end()


class _Link:
    """One process, and the calls on their way to it and through it."""

    def __init__(self, replicas: Sequence[TorchReplica]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.waiting: deque[Call] = deque()
        self.sent: deque[Call] = deque()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, replicas), daemon=True)
        self._process.start()
        theirs.close()

    def require_ready(self) -> None:
        problem = self._receive() if self.connection.poll(READY_S) else f"no sign of life within {READY_S} s"
        if problem is not None:
            raise RunError(problem)

    def send(self) -> None:
        while self.waiting and len(self.sent) < AHEAD:
            call = self.waiting.popleft()
            try:
                self.connection.send(call.order)
            except ConnectionError as error:
                raise self._died() from error
            self.sent.append(call)

    def take_answer(self) -> None:
        self.sent.popleft().answer = self._receive()
        self.send()

    def end(self) -> None:
        self._process.kill()  # it has nothing to clean up, and may have inherited a handler of what is milder
        self._process.join()
        self.connection.close()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error

    def _died(self) -> RunError:
        self._process.join()
        return RunError(
            f"a process that computes for the simulation has died (exit code {self._process.exitcode}); is there "
            "enough memory? sim.processes = 1 does without such processes"
        )


def _serve(connection: Connection, replicas: Sequence[TorchReplica]) -> None:
    """Answer calls until the simulation is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the simulation's business: it ends us
    torch.set_num_threads(1)
    connection.send(_problem())
    while True:
        try:
            worker, work, args = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (work(replicas[worker], *args), None)
        except DecentralError as error:
            answer = (None, error)
        except Exception:  # it may refer to what cannot be sent; its text can
            answer = (None, RuntimeError(f"worker {worker}, in a process of its own:\n{traceback.format_exc()}"))
        connection.send(answer)


def _problem() -> str | None:
    """Return why this process cannot compute gradients: torch forbids it if its parent has done so on a GPU."""
    try:
        torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error)
    return None
