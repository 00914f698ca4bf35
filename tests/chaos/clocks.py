"""Wall clocks of single nodes that go wrong, though all nodes share one kernel: see `skew.c`."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_name("skew.c")


class Clocks:
    """A wall clock for each of the nodes `1 .. count`, right at first. Raises `CalledProcessError` without a compiler.

    `environment` has, by node, the variables of the processes whose clock it is.
    """

    def __init__(self, folder: Path, count: int) -> None:
        library = folder / "skew.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        self._files = {node: folder / f"skew-{node}" for node in range(1, count + 1)}
        self.environment: Mapping[int, Mapping[str, str]] = {
            node: {"LD_PRELOAD": str(library), "CLOCK_SKEW": str(file)} for node, file in self._files.items()
        }
        for file in self._files.values():
            file.write_bytes(struct.pack("q", 0))

    def skew(self, node: int, seconds: int) -> None:
        """Have the node's clock jump to so many seconds ahead of the others', or behind."""
        with self._files[node].open("r+b") as file:
            file.write(struct.pack("q", seconds))


def why_not() -> str:
    """Return what this machine lacks for such clocks; nothing if it can have them."""
    return "" if shutil.which("cc") else "clocks that go wrong need a C compiler, cc"
