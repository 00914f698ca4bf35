"""SIGTERM: how operating systems, containers and batch systems tell a process to go."""

from __future__ import annotations

import asyncio
import signal
import threading

from decentral.workers.notices.notice import Notice, NoticeSource

GRACE_S = 30.0
"""Seconds until SIGKILL follows: Kubernetes' and Slurm's default, and what Ray gives a node. The signal tells none."""


class SigtermNotices(NoticeSource):
    """This process gets SIGTERM. While this waits, the signal does nothing else; before and after, what it did before.

    Python hands signals to the main thread alone: an event loop in another one hears none, and this ends at once.
    """

    name = "sigterm"

    async def wait(self) -> Notice | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        before = signal.getsignal(signal.SIGTERM)
        loop.add_signal_handler(signal.SIGTERM, heard.set)
        try:
            await heard.wait()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            if before is not None:  # None: set by other than Python, and lost to us
                signal.signal(signal.SIGTERM, before)
        return Notice(self.name, GRACE_S, "the process was sent SIGTERM")
