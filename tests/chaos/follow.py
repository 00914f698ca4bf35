"""A journal that is still being written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from decentral.journal import Record, record_from


class Follower:
    """Reads the records that have come to a journal since it last looked; the file need not be there yet."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._read = journal, 0

    def fresh(self) -> Iterator[Record]:
        if not self._journal.exists():
            return
        with self._journal.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield record_from(json.loads(line))
