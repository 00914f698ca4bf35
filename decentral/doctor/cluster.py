"""All nodes of a Ray cluster: Ray brings a visitor to each, and they visit one another over the workers' transport."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from decentral.config import Run, validated
from decentral.doctor.post import Post
from decentral.doctor.visits import Visit, visit
from decentral.errors import RunError
from decentral.workers import rpc
from decentral.workers.cluster import connected, first_line, host_here

START_S = 120.0
"""Seconds that a node has to start a process there, which imports torch."""
VISIT_S = 300.0
"""Seconds that a visit may take: looking around, and sending packets over a thin link."""


class Visitor:
    """A node's post, and whoever goes from there to those of the others. A Ray actor."""

    def __init__(self, table: dict[str, Any], secret: str) -> None:
        run = validated(table, "run")
        self._keys = rpc.Keys.here(secret, run.real.certificates)
        self._post = Post(run, self._keys)

    async def open(self) -> str:
        """Return the address at which others reach the post."""
        return await self._post.start(host_here())

    async def go(self, source: str, target: str, address: str, measure: bool) -> dict[str, Any]:
        """Return the fields of a visit."""
        return asdict(await visit(source, target, address, self._keys, measure=measure))


def visits_on(address: str, run: Run) -> list[Visit]:
    """Return the visits of every node of the cluster to itself and to all others; bandwidth is measured to the next.

    One after the other, so that none of them is in the way of another. Raises `RunError`.
    """
    with connected(address):
        names = _names()
        table, secret = run.to_table(), secrets.token_hex(32)
        visitors = {name: _visitor(node, table, secret) for name, node in names.items()}
        try:
            opened = ray.get([visitor.open.remote() for visitor in visitors.values()], timeout=START_S)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"not all of {', '.join(names)} have started a process within {START_S:g} s") from None
        except ray.exceptions.RayError as error:
            raise RunError(f"a node cannot be looked at: {first_line(error)}") from None
        return list(_visits(visitors, dict(zip(names, opened, strict=True))))


def _visits(visitors: dict[str, Any], posts: dict[str, str]) -> Iterator[Visit]:
    order = list(posts)
    for source, following in zip(order, [*order[1:], order[0]], strict=True):
        for target in order:
            measure = target == following != source
            call = visitors[source].go.remote(source, target, posts[target], measure)
            try:
                yield Visit(**ray.get(call, timeout=VISIT_S))
            except ray.exceptions.RayError as error:  # the node has gone, or its visitor
                yield Visit(source, target, f"nobody goes from there: {first_line(error)}")


def _visitor(node: str, table: dict[str, Any], secret: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Visitor).options(num_cpus=0, scheduling_strategy=there).remote(table, secret)


def _names() -> dict[str, str]:
    """Return Ray's names of the nodes that live, by what people know them by."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})": node["NodeID"]
        for address, node in zip(addresses, nodes, strict=True)
    }
