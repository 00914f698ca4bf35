"""A process that is killed while it writes checkpoints leaves a whole one behind, whatever it was doing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from shelf import OWNER, fleet, same, written

from decentral.checkpoint import Archive, Storage, load, newest

PATIENCE_S = 60.0


def begun(place: Path) -> list[list[str]]:
    """Return the names of the files in each checkpoint's folder, oldest first."""
    try:
        return [sorted(os.listdir(path)) for path in sorted(place.glob("*-*"))]
    except FileNotFoundError:  # one was removed while we looked
        return []


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_killed_with_so_many_files_of_the_newest_begun(tmp_path: Path, files: int) -> None:
    """Tensors are made here: a forked child must not begin threads of its own."""
    place = tmp_path / "kept"
    storage = Storage(str(place))
    Archive(storage, OWNER, 2).claim(resume=False)
    snapshots = {step: fleet(step, size=200_000) for step in range(1, 4)}
    child = os.fork()
    if child == 0:
        try:
            while True:
                for each in snapshots.values():
                    written(storage, each)
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            folders = begun(place)
            if len(folders) > 2 and len(folders[-1]) >= files and "manifest.json" not in folders[-1]:
                break
            assert time.monotonic() < deadline, folders
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = newest(storage)
    assert found is not None
    assert set(found.passed_over.values()) <= {"it has no manifest: it was never finished"}
    assert all(same(load(storage, found, worker), each) for worker, each in snapshots[found.manifest.step].items())
