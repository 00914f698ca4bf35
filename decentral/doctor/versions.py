"""Whether all nodes have the same software."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from decentral.config import Run
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding

PACKAGES = ("decentral", "torch", "ray", "grpcio")
MUST_AGREE = ("python", "decentral", "ray")
"""Ray refuses nodes of another Ray or Python, and workers of another decentral may not read each other's packets."""


class Versions(Check):
    name = "versions"

    def look(self, run: Run) -> Seen:
        python = ".".join(platform.python_version_tuple()[:2])
        return {"python": python, **{package: _version(package) for package in PACKAGES}}

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        agreed = []
        for what in ("python", *PACKAGES):
            found = {node: seen[what] for node, seen in nodes.items()}
            if len(set(found.values())) == 1:
                agreed.append(f"{what} {next(iter(found.values()))}")
                continue
            told = ", ".join(f"{number} on {node}" for node, number in found.items())
            advice = "install the same on all of them, as constraints.txt pins it"
            yield (self.problem if what in MUST_AGREE else self.warning)(f"{what} differs: {told}", advice)
        if agreed:
            yield self.ok(", ".join(agreed))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
