"""All checks of nodes, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from decentral.config import Run
from decentral.doctor.certificates import CertificateFiles
from decentral.doctor.check import Check, Seen
from decentral.doctor.descriptors import Descriptors
from decentral.doctor.disks import Disks
from decentral.doctor.finding import Finding
from decentral.doctor.gpus import GPUs
from decentral.doctor.memory import Memory
from decentral.doctor.ports import Ports
from decentral.doctor.processors import Processors
from decentral.doctor.ray_settings import RaySettings
from decentral.doctor.versions import Versions

CHECKS: tuple[Check, ...] = (
    Versions(),
    Processors(),
    GPUs(),
    Memory(),
    Disks(),
    Ports(),
    Descriptors(),
    CertificateFiles(),
    RaySettings(),
)


def look(run: Run) -> dict[str, Seen]:
    """Return what all checks see on this node, by check."""
    return {check.name: check.look(run) for check in CHECKS}


def judge(nodes: Mapping[str, Mapping[str, Seen]], run: Run) -> Iterator[Finding]:
    """Yield what they say of what they have seen on these nodes; one of another version may not have them all."""
    for check in CHECKS:
        yield from check.judge({node: seen[check.name] for node, seen in nodes.items() if check.name in seen}, run)
