"""The coordinator of a run without Ray: it begins the run, gives up who is gone, and ends when nobody is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from decentral.config import Run
from decentral.errors import RunError
from decentral.journal import Left, Record, record_from
from decentral.workers.coordinator import SILENCE_S, Coordinator, Gone
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.rpc import Keys, address_of
from decentral.workers.transport import call_worker

See = Callable[[Sequence[Record]], None]
"""Who is handed a run's records."""

log = logging.getLogger(__name__)

POLL_S = 0.5
WAITING_S = (5.0, 30.0)
"""Seconds after which it says for whom the run waits: the first time, and from then on."""
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
        await _attend(coordinator, run, see, address_of(*address))
    finally:
        await server.stop(GRACE_S)


def _cannot_listen(address: tuple[str, int]) -> RunError:
    return RunError(
        f"address: cannot listen at {address_of(*address)}: the port is in use, or the host is not this machine; name "
        "another one, the same for all workers"
    )


async def _attend(coordinator: Coordinator, run: Run, see: See, address: str) -> None:
    taken = 0
    gone: dict[Gone, float] = {}
    tells_at = time.monotonic() + WAITING_S[0]
    while True:
        poll = coordinator.poll(taken)
        taken += len(poll["records"])
        records = [record_from(fields) for fields in poll["records"]]
        see(records)
        for record in records:
            if isinstance(record, Left) and record.reason != "finished":
                rest = len(poll["members"])
                log.warning("worker %d left at step %d (%s); %d go on", record.worker, record.step, record.reason, rest)
        if poll["begun"] and not poll["members"]:
            return
        now = time.monotonic()
        if not poll["begun"] and now >= tells_at:
            tells_at = now + WAITING_S[1]
            absent = sorted(coordinator.expected - {worker for worker, _ in poll["lives"]})
            log.warning("the coordinator at %s waits for workers %s of %d", address, absent, run.fleet.size)
        for lost in poll["gone"]:
            since = gone.setdefault(lost, now)
            # Who is silent may be beyond a cut and alive. After so long it has given us up, too.
            if lost.reason == "crashed" or now - since > run.real.start_timeout_s:
                coordinator.remove(*lost)
                del gone[lost]
        await asyncio.sleep(POLL_S)
