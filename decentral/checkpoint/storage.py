"""Where checkpoints lie: any URL that fsspec understands, a folder of this machine among them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import fsspec
import fsspec.utils

from decentral.checkpoint.threads import started
from decentral.errors import ConfigError, DecentralError

T = TypeVar("T")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""The extra of this package that brings the driver of a protocol."""
BLOCK = 1 << 23
"""Bytes of one part of a long upload; object stores want at least 5 MiB."""
ANSWER_S = 100.0
"""Seconds that storage may take over a list, a few MiB, or to have a whole file on the disk.

Less than `real.start_timeout_s` is by default: whoever waits for a start hears why it failed."""


class StorageError(DecentralError):
    """Storage cannot be read or written now: no space, no right, no answer. Training goes on without it."""

    status = 1


class Storage:
    """Files below `url`. Names are relative to it, with slashes.

    Raises `ConfigError` if fsspec has no driver for the URL; everything else raises `StorageError`, which says what
    could not be done, where and why. Whatever a driver raises is a reason, not a defect of ours: they do not agree on
    a base class for their errors. So is silence: storage in which nothing moves for `ANSWER_S` seconds is not waited
    for, nor asked for anything more until it has answered.
    """

    def __init__(self, url: str, **options: Any) -> None:
        """`options` are the driver's own, such as `endpoint_url` of s3; most come from its environment variables."""
        self.url = url.rstrip("/")
        protocol = fsspec.utils.get_protocol(url)
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            advice = f"pip install 'decentral[{extra}]'" if extra else f"install what it names: {error}"
            raise ConfigError(f"checkpoint.url: {self.url} needs a driver that is not installed; {advice}") from error
        except ValueError as error:
            raise ConfigError(
                f"checkpoint.url: {self.url} is nothing that fsspec knows ({error}); give a folder, or a URL such as "
                "s3://bucket/run or gs://bucket/run"
            ) from error
        self._local = protocol in ("file", "local")
        self._overdue: Future[Any] | None = None
        self._moved = 0.0

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file that nobody reads yet. When it returns the file is there to stay; if it raises, maybe a part."""

        def write() -> None:
            if self._local:
                _write_through(self._place(name), self._moving(pieces))
                return
            file = self._system.open(self._place(name), "wb", block_size=BLOCK)
            try:
                for piece in self._moving(pieces):
                    file.write(piece)
                file.close()
            except BaseException:
                _give_up(file)
                raise

        self._answer("write", name, write)

    def put(self, name: str, data: bytes) -> None:
        """Write a file at once: whoever looks finds what was there before, or all of this."""

        def put() -> None:
            if not self._local:
                self._system.pipe_file(self._place(name), data)
                return
            place = self._place(name)
            try:
                _write_through(place + ".tmp", [data])
                os.replace(place + ".tmp", place)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(place + ".tmp")
            _sync_folder(os.path.dirname(place))

        self._answer("write", name, put)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return a file's bytes `start .. stop - 1`, fewer if it is shorter."""

        def read() -> bytes:
            data: bytes = self._system.cat_file(self._place(name), start=start, end=stop)
            return data

        return self._answer("read", name, read)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the files anywhere below a folder with their sizes in bytes; none if there is no such folder."""

        def sizes() -> dict[str, int]:
            self._system.invalidate_cache()  # somebody else may have written
            place = self._place(folder)
            found: dict[str, Any] = self._system.find(place, detail=True)
            return {path[len(self._root) :].lstrip("/"): int(entry["size"]) for path, entry in found.items()}

        return self._answer("list", folder, sizes)

    def remove(self, names: Iterable[str], folder: str) -> None:
        """Remove files, and then the folder, if storage has such a thing and nothing is left in it."""

        def remove() -> None:
            for name in self._moving(names):
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(self._place(name))
            if self._local:
                with contextlib.suppress(OSError):
                    os.rmdir(self._place(folder))

        self._answer("remove", folder, remove)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _moving(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; with each, storage has shown that it goes on."""
        for item in items:
            self._moved = time.monotonic()
            yield item

    def _answer(self, what: str, name: str, ask: Callable[[], T]) -> T:
        """Return what storage answers; raises `StorageError` with its reason, or without one if nothing moves."""
        trouble = f"{self.url}: cannot {what} {name or 'it'}"
        if self._overdue is not None and not self._overdue.done():
            raise StorageError(f"{trouble}: an earlier call has had no answer yet")
        self._moved = time.monotonic()
        answer = started(ask)
        while not answer.done():
            left_s = self._moved + ANSWER_S - time.monotonic()
            if left_s <= 0:
                self._overdue = answer
                raise StorageError(f"{trouble}: no answer for {ANSWER_S:g} s")
            wait([answer], left_s)
        try:
            return answer.result()
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise StorageError(f"{trouble}: {reason.splitlines()[0]}") from error


def _give_up(file: Any) -> None:
    """Forget a half-written upload. Closing the file would complete it."""
    with contextlib.suppress(Exception):  # the first failure is the one to tell of
        file.discard()
    with contextlib.suppress(AttributeError):  # a file in memory has nothing to complete
        file.closed = True  # or the driver would complete it when the object is collected


def _write_through(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a local file, its folder made if need be, and return when it is on the disk."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    """Have the names in a folder on the disk, where the system knows such a thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
