"""Where a run's status comes from: the coordinator of a running job, or the journal in a run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from decentral.errors import ConfigError, RunError
from decentral.journal import record_from
from decentral.workers.status import Status, Tally

Look = Callable[[], Status | None]
"""Returns a run's status as of now; None, if there is nobody to tell it."""


@contextmanager
def looking(folder: Path | None, address: str, run: str | None) -> Iterator[Look]:
    """Yield the look at a run: that of the folder, or, without one, the one of that name on the cluster.

    Raises `ConfigError` for a folder that is none of a run, `RunError` for a cluster or a run that cannot be had.
    """
    if folder is not None:
        yield JournalLook(folder)
        return
    from decentral.workers import attach  # Ray takes a second to import
    from decentral.workers.cluster import connected

    with ExitStack() as stack:
        try:
            stack.enter_context(connected(address))
        except RunError as error:
            raise RunError(
                f"{error}. Without --address a run has a Ray of its own, which lets nobody else in: name its folder, "
                "such as runs/x"
            ) from None
        name = attach.the_run(run)
        yield lambda: attach.ask(name)


class JournalLook:
    """Looks at a run by its journal, which may still be growing: each look reads on from where the last one ended."""

    def __init__(self, folder: Path) -> None:
        journal = folder / "journal.jsonl"
        if not journal.is_file():
            raise ConfigError(f"{folder}: there is no journal.jsonl in this folder; name the folder of a run")
        self._folder, self._journal = folder, journal
        self._file = journal.open(encoding="utf-8")
        self._torn = ""
        self._tally = Tally()

    def __call__(self) -> Status:
        is_over = (self._folder / "summary.json").exists()  # asked first: what is read then is all there is
        *lines, self._torn = (self._torn + self._file.read()).split("\n")
        for line in lines:
            try:
                self._tally.see(record_from(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{self._journal}: not a journal record ({error}): {line[:80]}") from error
        status = self._tally.status(str(self._folder))
        status["over"] |= is_over
        return status
