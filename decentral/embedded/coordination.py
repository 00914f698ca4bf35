"""The coordinator of a run without Ray: it begins the run, gives up who is gone, and ends when nobody is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from decentral.config import Run
from decentral.errors import RunError
from decentral.journal import Record, record_from
from decentral.workers.coordinator import SILENCE_S, Coordinator, Gone
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.rpc import Keys, address_of
from decentral.workers.transport import call_worker

See = Callable[[Sequence[Record]], None]
"""Who is handed a run's records."""

POLL_S = 0.5
GRACE_S = 2.0
"""Seconds that answers on their way have when the run is over."""


async def coordinate(
    run: Run,
    keys: Keys,
    address: tuple[str, int],
    see: See,
    serves: asyncio.Future[None],
) -> None:
    """Serve the coordinator at that host and port until all workers have left; `see` is handed their records.

    `serves` is done when it listens, or has the `RunError` of a port that cannot be had.
    """
    coordinator = Coordinator(
        range(run.fleet.size),
        silence_s=max(SILENCE_S, run.patience_s),
        call=lambda worker: call_worker(worker, keys),
    )
    server = CoordinatorServer(coordinator, keys)
    try:
        await server.start(*address)
    except Exception as error:
        serves.set_exception(_cannot_listen(address) if isinstance(error, RunError) else error)
        return
    serves.set_result(None)
    try:
        await _attend(coordinator, run, see)
    finally:
        await server.stop(GRACE_S)


def _cannot_listen(address: tuple[str, int]) -> RunError:
    return RunError(
        f"address: cannot listen at {address_of(*address)}: the port is in use, or the host is not this machine; name "
        "another one, the same for all workers"
    )


async def _attend(coordinator: Coordinator, run: Run, see: See) -> None:
    taken = 0
    gone: dict[Gone, float] = {}
    while True:
        poll = coordinator.poll(taken)
        taken += len(poll["records"])
        see([record_from(fields) for fields in poll["records"]])
        if poll["begun"] and not poll["members"]:
            return
        now = time.monotonic()
        for lost in poll["gone"]:
            since = gone.setdefault(lost, now)
            # Who is silent may be beyond a cut and alive. After so long it has given us up, too.
            if lost.reason == "crashed" or now - since > run.real.start_timeout_s:
                coordinator.remove(*lost)
                del gone[lost]
        await asyncio.sleep(POLL_S)
