"""Processes that compute for the simulation: each works through the calls for its own replicas, in their order.

The processes are forked, so they have the replicas, the task and its data without any of it being sent; parameters and
what else the simulation looks at lie in an `Arena`. A replica is always served by the same process: whatever a model
or an optimiser remembers elsewhere stays in one place, and the results do not depend on how many processes there are.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from decentral.errors import DecentralError, RunError
from decentral.replica import TorchReplica
from decentral.sim.engine.together import SIZES, Together

AHEAD = 16
"""Calls that a process is sent before it has answered the first: it need not wait for us, and no pipe is ever full."""
READY_S = 30
"""Seconds until a process must have begun: what other threads held when it was forked, it can never have."""

SOON_S = 1e-3
"""Seconds for which a process waits for another call to compute with the one it has: many are asked for at once."""

Work = Callable[..., Any]
"""A function of a module, called with a replica and plain values."""
_Answer = tuple[Any, Exception | None]


class _Order(NamedTuple):
    """A call as it is sent: for which replica, what, and with which values."""

    worker: int
    work: Work
    args: tuple[Any, ...]


def cores() -> int:
    """Return how many processes can compute at the same time here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork(threads: int) -> bool:
    """Say whether a process forked from this one can compute with so many threads."""
    return hasattr(os, "fork") and threads == 1


class Call:
    """Work handed in to a pool; `result` waits for it."""

    def __init__(self, pool: Pool, worker: int, work: Work, args: tuple[Any, ...]) -> None:
        self._pool = pool
        self.order = _Order(worker, work, args)
        self.answer: _Answer | None = None

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

    def __init__(self, replicas: Sequence[TorchReplica], processes: int, together: Together | None = None) -> None:
        """Fork the processes. Raises `RunError` if a process forked from this one cannot compute gradients.

        `together` computes local phases of replicas of one process that are asked for at once.
        """
        self._links: list[_Link] = []
        try:
            for _ in range(processes):
                self._links.append(_Link(replicas, together))
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

    def __init__(self, replicas: Sequence[TorchReplica], together: Together | None) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.waiting: deque[Call] = deque()
        self.sent: deque[Call] = deque()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, self.connection, replicas, together), daemon=True
        )
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


def _serve(
    connection: Connection, other_end: Connection, replicas: Sequence[TorchReplica], together: Together | None
) -> None:
    """Answer calls until the simulation, which has the other end, is gone."""
    other_end.close()  # as long as anybody has it open nothing ends here
    gc.freeze()  # our parent's garbage is not ours: a gRPC channel's end waits for a thread that no fork has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the simulation's business: it ends us
    torch.set_num_threads(1)
    connection.send(_problem())
    waiting: deque[_Order] = deque()
    while True:
        try:
            group = _next(connection, waiting, together is not None)
        except EOFError:
            return
        for answer in _answers(replicas, group, together):
            connection.send(answer)


def _next(connection: Connection, waiting: deque[_Order], together: bool) -> list[_Order]:
    """Return the next call, with those right behind it that can be computed with it; `EOFError` if none will come."""
    if not waiting:
        waiting.append(connection.recv())
    group = [waiting.popleft()]
    if not together or group[0].work is not TorchReplica.train:
        return group
    while len(group) < SIZES[0]:
        if not waiting and connection.poll(SOON_S):
            waiting.append(connection.recv())
        if not waiting or not _fits(waiting[0], group):
            break
        group.append(waiting.popleft())
    size = next((size for size in SIZES if size <= len(group)), 1)
    waiting.extendleft(reversed(group[size:]))
    return group[:size]


def _fits(order: _Order, group: Sequence[_Order]) -> bool:
    """Say whether a call is one for as many local steps of another replica."""
    first = group[0]
    same = order.work is first.work and order.args[1] == first.args[1]
    return same and all(order.worker != each.worker for each in group)


def _answers(replicas: Sequence[TorchReplica], group: Sequence[_Order], together: Together | None) -> list[_Answer]:
    if together is None or len(group) == 1:
        return [answer_of(partial(work, replicas[worker], *args), f"worker {worker}") for worker, work, args in group]
    members, begun = [replicas[order.worker] for order in group], [order.args[0] for order in group]
    name = f"workers {[order.worker for order in group]}"
    losses, error = answer_of(partial(together.train, members, begun, group[0].args[1]), name)
    if error is not None:
        return [(None, error)] * len(group)
    return [
        answer_of(partial(member.judged, first, own), f"worker {member.worker}")
        for member, first, own in zip(members, begun, losses, strict=True)
    ]


def answer_of(work: Callable[[], Any], name: str) -> _Answer:
    """Return what `work` returns, or raises, in a form that can be sent; `name` says whose work it is."""
    try:
        return work(), None
    except DecentralError as error:
        return None, error
    except Exception:  # it may refer to what cannot be sent; its text can
        return None, RuntimeError(f"{name}, in a process of its own:\n{traceback.format_exc()}")


def _problem() -> str | None:
    """Return why this process cannot compute gradients: torch forbids it if its parent has done so on a GPU."""
    try:
        torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error)
    return None
