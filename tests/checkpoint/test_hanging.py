"""Storage that never answers: nobody waits for it longer than has been said, and no process is held up by it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from decentral.checkpoint import Storage, StorageError, storage

URL = "hanging://run"


class Hanging(MemoryFileSystem):  # type: ignore[misc]
    """Answers nothing while the gate is shut, and slowly if it is to."""

    protocol = "hanging"
    gate: ClassVar[threading.Event] = threading.Event()
    pause_s: ClassVar[float] = 0.0

    def _open(self, *arguments: Any, **options: Any) -> Any:
        self.gate.wait()
        file = super()._open(*arguments, **options)
        write = file.write

        def slowly(data: bytes) -> int:
            threading.Event().wait(self.pause_s)
            written: int = write(data)
            return written

        file.write = slowly
        return file

    def pipe_file(self, *arguments: Any, **options: Any) -> None:
        self.gate.wait()
        super().pipe_file(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        self.gate.wait()
        return super().cat_file(*arguments, **options)

    def find(self, *arguments: Any, **options: Any) -> Any:
        self.gate.wait()
        return super().find(*arguments, **options)

    def rm_file(self, *arguments: Any, **options: Any) -> None:
        self.gate.wait()
        super().rm_file(*arguments, **options)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    Hanging.gate.clear()
    yield Hanging.gate
    Hanging.gate.set()


CALLS: dict[str, Callable[[Storage], object]] = {
    "write a": lambda storage: storage.write("a", [b"1", b"2"]),
    "write b": lambda storage: storage.put("b", b"3"),
    "read c": lambda storage: storage.read("c"),
    "list it": lambda storage: storage.sizes(),
    "remove d": lambda storage: storage.remove(["d/e"], "d"),
}


@pytest.mark.parametrize("what", CALLS)
def test_whoever_asks_is_told_in_time_and_may_ask_again_once_there_is_an_answer(
    what: str, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_S", 0.2)
    place = Storage(URL)
    with pytest.raises(StorageError, match=rf"^hanging://run: cannot {what}: no answer for 0\.2 s$"):
        CALLS[what](place)
    monkeypatch.setattr(storage, "ANSWER_S", 100.0)
    with pytest.raises(StorageError, match="an earlier call has had no answer yet"):
        place.sizes()
    gate.set()
    assert place._overdue is not None
    place._overdue.exception(timeout=30)
    place.put("b", b"4")
    assert place.read("b") == b"4"


def test_storage_that_goes_on_has_as_long_as_it_takes(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ANSWER_S", 0.5)
    monkeypatch.setattr(Hanging, "pause_s", 0.1)
    gate.set()
    place = Storage(URL)
    place.write("a", [b"x"] * 10)
    assert place.read("a") == b"x" * 10


ENDS = """
import asyncio, contextlib
from decentral.checkpoint import Storage, in_thread
from test_hanging import URL, Hanging, fsspec

async def main():
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    writing = asyncio.ensure_future(in_thread(lambda: Storage(URL).put("a", b"1")))
    await asyncio.wait([writing], timeout=0.2)
    assert not writing.done()
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    print("ended", flush=True)

asyncio.run(main())
"""


def test_a_process_ends_though_storage_hangs() -> None:
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=here, capture_output=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (b"ended\n", b"", 0)
