"""What is known to trip up Ray."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from decentral.config import Run
from decentral.doctor import sizes
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding

SOCKET = "/ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray appends to its temporary folder, in the longest case."""
LONGEST_SOCKET = 107
"""Characters that Linux takes of a socket's path."""
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 2 << 30
"""Bytes of shared memory below which Ray falls back to files."""
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy")


class RaySettings(Check):
    name = "Ray"

    def look(self, run: Run) -> Seen:
        return {
            "folder": os.environ.get("RAY_TMPDIR", "/tmp"),
            "shared": shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.exists() else 0,
            "proxies": [name for name in PROXIES if os.environ.get(name)],
            "exempt": bool(os.environ.get("no_proxy") or os.environ.get("NO_PROXY")),
            "token": os.environ.get("RAY_AUTH_MODE") == "token",
        }

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        found = [finding for node, seen in nodes.items() for finding in self._of(node, seen)]
        if len(nodes) > 1 and not all(seen["token"] for seen in nodes.values()):
            found.append(
                self.warning(
                    "the cluster takes whoever reaches it: RAY_AUTH_MODE is not token on all nodes",
                    "keep Ray's ports within one site, or start it with RAY_AUTH_MODE=token; whoever has a way in runs "
                    "any code there",
                )
            )
        yield from found or [self.ok("none of the known traps")]

    def _of(self, node: str, seen: Seen) -> Iterator[Finding]:
        length = len(seen["folder"].rstrip("/") + SOCKET)
        if length > LONGEST_SOCKET:
            yield self.problem(
                f"{node}: sockets below {seen['folder']} have names of {length} letters; Linux takes {LONGEST_SOCKET}",
                "set RAY_TMPDIR to a shorter folder",
            )
        if seen["shared"] < LEAST_SHARED:
            yield self.warning(
                f"{node}: /dev/shm has {sizes.human(seen['shared'])}; Ray then uses files, which is slow",
                "in a container: --shm-size=4g",
            )
        if seen["proxies"] and not seen["exempt"]:
            yield self.warning(
                f"{node}: {', '.join(seen['proxies'])} is set without no_proxy, and Ray's calls may go to the proxy",
                "name the nodes' addresses in no_proxy",
            )
