"""The coordinator's part in checkpoints: have one written, commit it, and know what of the journal is before it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from pydantic import ValidationError

from decentral.checkpoint.archive import Archive
from decentral.checkpoint.desk import Abandoned, Desk, Draft, Uneven
from decentral.checkpoint.keep import Aside
from decentral.checkpoint.manifest import Description, Manifest
from decentral.journal import Record

ATTEMPTS = 6
"""Times that a checkpoint is begun whose workers took their states a round apart; each looks further ahead."""
NOWHERE = "nowhere"
"""The folder of a checkpoint that is not written."""


async def make_checkpoint(
    desk: Desk,
    archive: Archive,
    members: Collection[int],
    aside: Aside,
    *,
    run: Mapping[str, Any],
    timeout_s: float,
    earlier: Mapping[int, int] | None = None,
    journalled: Callable[[Mapping[int, int]], Awaitable[None]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[str, Manifest]:
    """Have these workers write a checkpoint and commit it; return its folder and manifest.

    `run` is the run file's table. `earlier` says how many records of each worker the journal had when it last came to
    the run (of one that is gone: how many it has). `journalled` is awaited before the commit, with how many records of
    each worker come before the checkpoint. `extra` is kept in the manifest as it is.

    Raises `Abandoned` when it could not be written (within `timeout_s` seconds an attempt), or `journalled` took as
    long: nothing has happened then, and the next one may be. `StorageError` and `RunError` as `Archive.commit` does.
    """

    async def begin() -> asyncio.Future[Draft]:
        return desk.begin(await aside(archive.next_folder), members)

    draft = await _agreed(desk, begin, timeout_s)
    journal = Counter(earlier)
    journal.update({worker: description.life.records for worker, description in draft.descriptions.items()})
    try:
        manifest = Manifest(
            number=int(draft.folder.split("-")[0]),
            owner=archive.owner,
            decentral=version("decentral"),
            torch=torch.__version__,
            run=dict(run),
            journal=dict(journal),
            extra=dict(extra or {}),
            workers=draft.descriptions,
            files=draft.files,
        )
    except ValidationError as error:
        raise Abandoned(f"the workers did not write what they were asked to: {error.errors()[0]['msg']}") from None
    if journalled is not None:
        try:
            await asyncio.wait_for(journalled(manifest.journal), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise Abandoned(f"within {timeout_s:g} s the journal had not every record before it") from None
    await aside(partial(archive.commit, draft.folder, manifest))
    return draft.folder, manifest


async def part(desk: Desk, members: Collection[int], reason: str, timeout_s: float) -> dict[int, Description]:
    """Have these workers leave for that reason, each with its state between the same two rounds; return what they hold.

    Raises `Abandoned` when they cannot (within `timeout_s` seconds an attempt): nothing has happened then.
    """

    async def begin() -> asyncio.Future[Draft]:
        return desk.begin(NOWHERE, members, reason)

    return (await _agreed(desk, begin, timeout_s)).descriptions


async def _agreed(desk: Desk, begin: Callable[[], Awaitable[asyncio.Future[Draft]]], timeout_s: float) -> Draft:
    for _attempt in range(ATTEMPTS):
        try:
            return await asyncio.wait_for(await begin(), timeout_s)
        except Uneven as error:
            apart = error
        except (asyncio.TimeoutError, TimeoutError):
            late = Abandoned(f"it was not written within {timeout_s:g} s: {desk.missing}")
            desk.abandon(str(late))
            raise late from None
    raise apart


def records_before(journal: Mapping[int, int], records: Iterable[Record]) -> Iterator[Record]:
    """Yield those of a journal's records that were made before a checkpoint, so many of each worker, in their order.

    A worker's records come in the order in which it made them; those after the checkpoint it will make once more.
    """
    seen: Counter[int] = Counter()
    for record in records:
        seen[record.worker] += 1
        if seen[record.worker] <= journal.get(record.worker, 0):
            yield record
