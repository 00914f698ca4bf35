"""Work in threads that nobody has to wait for: storage may never answer, and a process must end all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def started(work: Callable[[], T]) -> Future[T]:
    """Begin blocking work in a thread of its own; return the future of what it returns, or raises.

    Threads of an executor are joined when the process ends, even those that hang; this one is not.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from now on it is not cancelled by who has lost interest

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="storage", daemon=True).start()
    return future


async def in_thread(work: Callable[[], T]) -> T:
    """Return what the blocking work returns. Who is cancelled meanwhile leaves the work to itself."""
    return await asyncio.wrap_future(started(work))
