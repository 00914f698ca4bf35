"""What a coordinator must not forget: entries in a file, so that it can be restarted and go on as it was.

A run of days has millions of entries, most of which say nothing any more. So the file begins anew now and then, with
one entry that says as much as all before it: it is written beside the old file and takes its name when it is whole.
Whenever a coordinator is killed, its successor finds the old entries or the new one.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

TAIL_BYTES = 1 << 20
"""Entries of so many bytes may always follow the first one: they are replayed in a tenth of a second."""
STALE_S = 86400.0
"""No run is silent for so long: a ledger that nobody has written or holds since then is of a run that was killed."""


class Ledger:
    """Appends entries (plain values) to a file. The operating system has each before `append` returns.

    So they outlive the process. They need not outlive the machine: with it goes the Ray node that has the run's driver,
    and nobody would come back to read them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(path.name + ".new")
        self._file: BinaryIO | None = None
        self._first = self._size = 0  # bytes of the first entry, and of all

    def entries(self) -> Iterator[list[Any]]:
        """Yield what was appended in earlier lives; drop an entry that was being written when the last one ended."""
        self._new.unlink(missing_ok=True)
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            unpacker = msgpack.Unpacker(file, strict_map_key=False, max_buffer_size=0)
            for entry in unpacker:
                self._size = unpacker.tell()
                self._first = self._first or self._size
                yield entry
        os.truncate(self._path, self._size)

    def append(self, entry: Any) -> None:
        """Have the entry in the file. Raises `OSError`, as of a full disk: then it is not there."""
        if self._file is None:
            self._file = _held(self._path)
        data = msgpack.packb(entry)
        try:
            _write(self._file, data)
        except OSError:
            self._file.truncate(self._size)  # a part of it would be read as the beginning of the next one
            raise
        self._first = self._first or len(data)
        self._size += len(data)

    @property
    def is_long(self) -> bool:
        """Whether it is worth while to `begin_anew`: the cost of it stays a share of the cost of appending."""
        return self._size - self._first > max(TAIL_BYTES, self._first)

    def begin_anew(self, entry: Any) -> None:
        """Have this entry, which says as much, in the place of all that are there."""
        data = msgpack.packb(entry)
        self._new.unlink(missing_ok=True)
        file = _held(self._new)
        try:
            _write(file, data)
            os.replace(self._new, self._path)
        except OSError:  # a full disk: what is there does as well
            file.close()
            self._new.unlink(missing_ok=True)
            return
        if self._file is not None:
            self._file.close()
        self._file, self._first, self._size = file, len(data), len(data)

    def remove(self) -> None:
        """The run is over: nobody needs the ledger any more."""
        self._path.unlink(missing_ok=True)
        self._new.unlink(missing_ok=True)


def ledger_of(owner: str) -> Path:
    """Return where the ledger of the run with this word lies, on the machine of its coordinator."""
    return Path(tempfile.gettempdir()) / f"decentral-{owner}.ledger"  # a folder for all would be the first user's


def remove_stale(folder: Path) -> None:
    """Remove ledgers that runs have left there which were killed.

    Those are files of this user, that no process holds and none has written for `STALE_S` seconds. A coordinator holds
    its own; between its death and its successor's first entry there are seconds.
    """
    for path in folder.glob("decentral-*.ledger*"):
        with suppress(OSError):  # somebody else's, or somebody else has removed it
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                found = os.fstat(descriptor)
                ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
                if ours and time.time() - found.st_mtime > STALE_S:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)


def _held(path: Path) -> BinaryIO:
    """Open a file to append to it. Whoever looks for stale ones sees that it is held, until this process ends."""
    file = path.open("ab", buffering=0)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
