"""A small disk of its own, that can be filled."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = "8m"
BLOCK = bytes(4096)


class Disk:
    """The disk whose root is `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        try:
            with self._ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(BLOCK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def clear(self) -> None:
        """Have room again."""
        self._ballast.unlink()


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """Mount a disk at the folder, which is made; nothing of it is left afterwards. Needs root.

    Namespaces that are entered later see it. Those that exist need not.
    """
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "disk", folder], check=True)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
