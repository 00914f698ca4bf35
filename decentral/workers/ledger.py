"""What a coordinator must not forget: entries in a file, so that it can be restarted and go on as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack


class Ledger:
    """Appends entries (plain values) to a file. The operating system has each before `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def entries(self) -> Iterator[list[Any]]:
        """Yield what was appended in earlier lives; drop an entry that was being written when the last one ended."""
        if not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            unpacker = msgpack.Unpacker(file, strict_map_key=False)
            for entry in unpacker:
                whole = unpacker.tell()
                yield entry
        with self._path.open("r+b") as file:
            file.truncate(whole)

    def append(self, entry: Any) -> None:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        self._file.write(msgpack.packb(entry))
