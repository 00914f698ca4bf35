"""One replica of torchft's DiLoCo for `benchmarks.recovery`; runs in torchft's environment.

Arguments: rank, replicas, elements, seconds a step, local steps a round, rounds between two kills, seconds after which
it dies that has begun to synchronise, steps in all, the folder for notes, the lighthouse's address. Timeouts are
torchft's own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo


def main() -> None:
    rank, replicas, numel = map(int, sys.argv[1:4])
    step_s, period, every = float(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    sending_s, steps, folder, lighthouse = float(sys.argv[7]), int(sys.argv[8]), Path(sys.argv[9]), sys.argv[10]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(numel, 1, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.001)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(),
        min_replica_size=2,
        use_async_quorum=False,  # as its DiLoCo wants it
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        replica_id=f"replica_{rank}_",
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
    )
    notes = os.open(folder / f"rests-{rank}-{os.getpid()}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    target = torch.randn(numel)
    last = steps // period
    with DiLoCo(manager, [model], inner, outer, sync_every=period):
        while manager.current_step() < last:
            for step in range(period):
                os.write(notes, f"{time.monotonic()}\n".encode())
                time.sleep(step_s)
                inner.zero_grad()
                (model.weight - target).square().mean().backward()
                turn, left = divmod(manager.current_step() + 1, every)
                victim = left == 0 and turn % replicas == rank and manager.num_participants() == replicas
                if step == period - 1 and victim and not (folder / f"death-{turn}").exists():
                    threading.Timer(sending_s, _die, (folder / f"death-{turn}",)).start()
                inner.step()
    manager.shutdown(wait=False)
    os._exit(0)


def _die(note: Path) -> None:
    note.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
