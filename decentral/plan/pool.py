"""Forecasts side by side: in as many processes as this machine has cores."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from decentral.sim.engine import can_fork, cores

T = TypeVar("T")
Spread = Callable[[Callable[[Any], T], Iterable[Any]], Iterable[T]]
"""Applies a function of a module to values, and returns what comes out in their order: `map`, or many at a time."""


@contextmanager
def spread(threads: int) -> Iterator[Spread[Any]]:
    """Yield a `map` over all cores, or `map` itself where there is one, or processes that use so many threads cannot be
    had."""
    if cores() == 1 or not can_fork(threads):
        yield map
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(cores(), context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
