"""Drains the nodes of a Ray cluster of its own, and prints what actors on them hear of it; `test_notices` runs it."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from decentral.workers.notices import first_notice, ray_drain, sources_named

PREEMPTION = 2
"""Ray's number for this reason to drain a node."""


class Actor:
    """Listens on its node, as a worker does: in an event loop in the main thread of a plain actor."""

    def listen(self) -> tuple[str, float] | None:
        ray_drain.EVERY_S = 0.05
        notice = asyncio.run(first_notice(sources_named(["ray", "sigterm"])))
        return notice and (notice.source, notice.deadline_s)

    def node(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node


def listener(where: str) -> Any:
    return ray.remote(Actor).options(num_cpus=1, resources={where: 1}).remote()


def main() -> None:
    """Drain the leaf with a deadline, then the head without one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}})
    cluster.add_node(num_cpus=1, resources={"leaf": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    actors = {where: listener(where) for where in ("leaf", "head")}
    nodes = {where: ray.get(actor.node.remote()) for where, actor in actors.items()}
    answers = {where: actor.listen.remote() for where, actor in actors.items()}
    gcs = GcsClient(address=cluster.address)
    gcs.drain_node(nodes["leaf"], PREEMPTION, "a test", int((time.time() + 100) * 1000))
    source, deadline_s = ray.get(answers["leaf"], timeout=20)
    print(f"leaf: {source}, {'90 to 100 s' if 90 < deadline_s <= 100 else deadline_s}")
    gcs.drain_node(nodes["head"], PREEMPTION, "a test", 0)
    source, deadline_s = ray.get(answers["head"], timeout=20)
    print(f"head: {source}, {'no time set' if deadline_s == float('inf') else deadline_s}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
