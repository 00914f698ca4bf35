"""The coordinator of a run of training loops in a process of its own: no worker's end is the end of the others' run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from decentral.config import Run
from decentral.embedded.coordination import See, coordinate
from decentral.embedded.join import for_loops, writing
from decentral.embedded.whereabouts import Wishes, whereabouts
from decentral.workers.rpc import Keys, address_of


def serve(run: Run, wishes: Wishes, out: Path | None, started: Callable[[str], None]) -> None:
    """Serve the coordinator until all workers have left; the journal goes into the folder `out`, if there is one.

    `wishes` and the environment say where, for how many workers, and with which secret, as for worker 0. `started` is
    told the address. Raises `ConfigError`, and `RunError` for a port that cannot be had.
    """
    size = run.fleet.size if "fleet" in run.model_fields_set else None
    here = whereabouts(wishes, os.environ, fleet=size, shared=False)
    run = for_loops(run, here.workers)
    keys = Keys.here(here.secret, run.real.certificates)
    with writing(run, out) as see:
        asyncio.run(_serve(run, keys, here.address, see, started))


async def _serve(run: Run, keys: Keys, address: tuple[str, int], see: See, started: Callable[[str], None]) -> None:
    serves = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(coordinate(run, keys, address, see, serves))
    await serves
    started(address_of(*address))
    await serving
