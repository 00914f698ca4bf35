"""Space and speed where run folders and checkpoints go."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import fsspec

from decentral.config import Run
from decentral.doctor import sizes
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding
from decentral.errors import TaskError
from decentral.folder import RUNS

WRITTEN = 16 << 20
"""Bytes that are written to see how fast that is."""
SLOW = 20e6
"""Bytes per second below which checkpoints hold up a run."""


class Disks(Check):
    name = "disks"

    def look(self, run: Run) -> Seen:
        return {str(path): _tried(path) for path in _folders(run)}

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        try:
            wanted = (run.checkpoint.keep + 1) * sizes.checkpoint_bytes(run)
        except TaskError:  # the check of memory says it
            wanted = 0
        for node, folders in nodes.items():
            for folder, disk in folders.items():
                yield self._judge_one(f"{folder} on {node}", disk, wanted)

    def _judge_one(self, where: str, disk: Seen, wanted: int) -> Finding:
        if "error" in disk:
            return self.problem(f"{where} cannot be written: {disk['error']}", "make room, or name another folder")
        told = f"{where}: {sizes.human(disk['free'])} free, {sizes.human(disk['bps'])}/s"
        if disk["free"] < wanted:
            return self.problem(f"{told}; checkpoints take about {sizes.human(wanted)}", "make room there")
        if disk["bps"] < SLOW:
            return self.warning(told, "checkpoints take long: name a faster disk, or make checkpoint.every_s larger")
        return self.ok(told)


def _folders(run: Run) -> list[Path]:
    folders = [RUNS.absolute()]
    if run.checkpoint.url and fsspec.utils.get_protocol(run.checkpoint.url) in ("file", "local"):
        folders.append(Path(run.checkpoint.url.removeprefix("file://")).absolute())
    return folders


def _tried(folder: Path) -> Seen:
    """Write into the folder, or where it will be made, and remove that again."""
    while not folder.exists():
        folder = folder.parent
    try:
        handle, name = tempfile.mkstemp(prefix=".decentral-doctor-", dir=folder)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    try:
        content = os.urandom(WRITTEN)  # some disks are quicker with zeros
        with os.fdopen(handle, "wb") as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            taken = time.perf_counter() - began
        return {"free": shutil.disk_usage(folder).free + WRITTEN, "bps": WRITTEN / taken}
    except OSError as error:
        return {"error": error.strerror or str(error)}
    finally:
        with suppress(OSError):
            os.unlink(name)
