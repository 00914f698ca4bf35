"""Ctrl-C between two pieces of work that must not be torn."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def whole(work: Callable[[T], object]) -> Iterator[Callable[[T], None]]:
    """Yield `work` as a function that Ctrl-C does not interrupt in the middle: `KeyboardInterrupt` comes at its end.

    Elsewhere it comes at once, as ever. For the main thread alone, as signal handlers are.
    """
    working = pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if not working:
            raise KeyboardInterrupt
        pressed = True

    def do(item: T) -> None:
        nonlocal working, pressed
        working = True
        try:
            work(item)
        finally:
            working = False
        if pressed:
            pressed = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield do
    finally:
        signal.signal(signal.SIGINT, before)
