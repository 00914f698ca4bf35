"""The processes that we have started, however far away: what each of them takes, from /proc. Linux alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process takes at a moment of this machine's monotonic clock."""

    at_s: float
    pid: int
    kind: str
    resident: int
    """Bytes of memory."""
    threads: int
    files: int
    """Open files, sockets among them."""


def adopt_orphans() -> None:
    """Be the parent of whoever below us loses its own, so that nobody gets out of sight."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) was refused")


def descendants() -> list[int]:
    """Return our children, their children, and so on, with those that have ended and nobody has asked about."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                children[_parent(int(entry.name))].append(int(entry.name))
    found, generation = list[int](), children[os.getpid()]
    while generation:
        found += generation
        generation = [child for parent in generation for child in children[parent]]
    return found


def sample(pid: int, at_s: float) -> Sample | None:
    """Return what a process takes; None if it has ended."""
    place = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
        return Sample(
            at_s=at_s,
            pid=pid,
            kind=kind_of(pid),
            resident=1024 * int(status["VmRSS"].split()[0]),
            threads=int(status["Threads"]),
            files=len(os.listdir(place / "fd")),
        )
    except (OSError, KeyError):
        return None


def kind_of(pid: int) -> str:
    """Return what a process of a run on Ray is, by its command line. Raises `OSError` if it has ended."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if command[0].startswith("ray::"):  # the title of an actor, with the method that runs
        return command[0].removeprefix("ray::").partition(".")[0]
    program = Path(command[0]).name
    if not program.startswith("python"):
        return program
    return next((Path(word).name for word in command[1:] if word and not word.startswith("-")), program)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
