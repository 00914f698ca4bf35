"""Ray drains a node: Ray's own way of saying that a machine will go. Ray does not tell the actors on it.

What is asked for is no public part of Ray: nothing else of ours may use it, and with a Ray that has none of it this
source has nothing to say.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

import ray

from decentral.checkpoint import in_thread
from decentral.workers.notices.notice import Notice, NoticeSource

EVERY_S = 2.0
"""Seconds between two questions to the head node; Ray drains a node that got SIGTERM for 30 s."""


class RayDrainNotices(NoticeSource):
    """The Ray node that this process belongs to is drained, for idleness, an update or a preemption."""

    name = "ray"

    async def wait(self) -> Notice | None:
        if not ray.is_initialized():
            return None
        node = ray.get_runtime_context().get_node_id()
        while True:
            try:
                deadline_ms = (await in_thread(_draining_nodes)).get(node)
            except AttributeError:
                return None
            except Exception:  # whatever a private function of a cluster in trouble may raise: ask again
                deadline_ms = None
            if deadline_ms is not None:
                left_s = max(0.0, deadline_ms / 1000 - time.time()) if deadline_ms else math.inf
                return Notice(self.name, left_s, "Ray drains this node")
            await asyncio.sleep(EVERY_S)


def _draining_nodes() -> Mapping[str, int]:
    """Return the nodes that are drained, by hex id, each with its deadline in ms since the epoch; 0: there is none."""
    draining: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    return draining
