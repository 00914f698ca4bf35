"""torchft's DiLoCo for `benchmarks.side_by_side`; runs in torchft's environment. All timeouts are torchft's own.

Arguments: rank, replicas, the folder for notes, the lighthouse's address.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from side import OUTER, PERIOD, STEPS, Replica
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo


def main() -> None:
    rank, replicas, folder, lighthouse = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    replica = Replica(rank, replicas, folder)
    model, inner = replica.model, replica.optimizer
    outer = torch.optim.SGD(model.parameters(), nesterov=True, **OUTER)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(),
        min_replica_size=1,
        use_async_quorum=False,  # as its DiLoCo wants it
        init_sync=False,  # all begin with the same parameters; else only one replica's first round counts
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        replica_id=f"replica_{rank}_",
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
    )
    with DiLoCo(manager, [model], inner, outer, sync_every=PERIOD):
        while replica.step < STEPS:
            replica.train()
    replica.finish()
    manager.shutdown(wait=False)
    os._exit(0)


if __name__ == "__main__":
    main()
