"""What a preemption notice is, where it comes from, and how many sources are heard as one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Notice:
    """This machine, or this worker, has been told to go.

    `deadline_s` is in seconds, counted from when the notice is handed over: what is left until the end, at least 0, and
    `math.inf` where no time was set. `source` is the name of who said so, `reason` a sentence for the journal.
    """

    source: str
    deadline_s: float
    reason: str


class NoticeSource(ABC):
    """One way of being told. Whatever goes wrong with it never becomes the worker's trouble."""

    name: ClassVar[str]
    """How a run file calls it."""

    @abstractmethod
    async def wait(self) -> Notice | None:
        """Return the notice when it comes; None as soon as it is clear that none can come here."""

    async def ready(self) -> None:  # noqa: B027 - most sources have nobody who waits for an answer
        """Say that nothing on this machine needs the rest of the time any more."""


async def first_notice(sources: Iterable[NoticeSource]) -> Notice | None:
    """Return the first notice of all sources, of several at once the most urgent; None when none can come."""
    async with aclosing(_heard(sources)) as heard:
        async for notice in heard:
            return notice
    return None


async def listen(sources: Iterable[NoticeSource], heed: Callable[[Notice], object]) -> None:
    """Call `heed` with the first notice, and with each later one that brings the end nearer.

    Returns when no source has anything more to say. To stop listening, cancel it.
    """
    async with aclosing(_heard(sources)) as heard:
        async for notice in heard:
            heed(notice)


async def _heard(sources: Iterable[NoticeSource]) -> AsyncGenerator[Notice, None]:
    """Yield the first notice and those that bring the end nearer, each when it comes."""
    loop = asyncio.get_running_loop()
    waiting = {loop.create_task(_guarded(source)) for source in sources}
    end: float | None = None  # by the loop's clock
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            notices = [notice for task in done if (notice := task.result()) is not None]
            for notice in sorted(notices, key=lambda notice: notice.deadline_s):
                ends = loop.time() + notice.deadline_s
                if end is None or ends < end:
                    end = ends
                    yield notice
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _guarded(source: NoticeSource) -> Notice | None:
    """Wait for the source; one that fails is told to the loop's exception handler, and the others go on."""
    try:
        return await source.wait()
    except Exception as error:
        message = f"the notices of '{source.name}' are not heard any more"
        asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
        return None
