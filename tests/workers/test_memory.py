"""What a run holds in memory does not grow with its leases, nor with its records where a file has these."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from decentral.config import validated
from decentral.folder import RunFolder
from decentral.inner import SGD
from decentral.journal import Record
from decentral.replica import LEASES_KEPT, TorchReplica
from decentral.tasks import Quadratic
from decentral.workers.launch import train


def test_a_replica_forgets_leases_that_nobody_looks_back_to() -> None:
    replica = TorchReplica(Quadratic(), SGD(lr=0.1), worker=1, seed=0, batch_size=4, total_steps=10**6)

    def lease(first: int, stop: int) -> int:
        """Lease a batch for each of these steps, none beside another; return how many blocks of memory Python has."""
        for step in range(first, stop):
            replica.lease(step, 8 * step)
        gc.collect()
        return sys.getallocatedblocks()

    warm = lease(0, LEASES_KEPT)
    assert lease(LEASES_KEPT, 11 * LEASES_KEPT) - warm < LEASES_KEPT


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_records_a_folder_has_keeps_none(tmp_path: Path) -> None:
    """`Outcome.records` reads them from the file, as often as one likes, and tells what the run has told."""
    table = {"steps": 20, "batch_size": 1, "task": {"name": "quadratic"}, "fleet": {"workers": [{"count": 2}]}}
    run = validated({**table, "rule": {"name": "diloco", "period": 5}}, "memory")
    folder, kinds = RunFolder(tmp_path / "run", run), list[str]()

    def see(record: Record) -> None:
        folder.write([record])
        kinds.append(record.kind)

    before = records_alive()
    outcome = train(run, on_record=see, journal=folder)
    folder.close()
    assert records_alive() <= before
    assert [record.kind for record in outcome.records] == [record.kind for record in outcome.records] == kinds
    assert outcome.samples() == 2 * 20
    outcome.verify()


def records_alive() -> int:
    gc.collect()
    return sum(isinstance(each, Record) for each in gc.get_objects())
