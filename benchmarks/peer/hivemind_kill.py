"""One of hivemind's processes for `benchmarks.recovery`; runs in hivemind's environment.

Arguments: rank, replicas, elements, seconds a step, local steps a round, the round in which one dies, seconds after
which it dies that has begun to average, seconds that survivors have, the folder for notes, addresses of the first
process. Prints its addresses. All timeouts are hivemind's own, which are none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import hivemind
import torch


def main() -> None:
    rank, replicas, numel = map(int, sys.argv[1:4])
    step_s, period, deadly = float(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
    sending_s, limit_s, folder = float(sys.argv[7]), float(sys.argv[8]), Path(sys.argv[9])
    torch.set_num_threads(1)
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=sys.argv[10:])
    params = torch.zeros(numel)
    averager = hivemind.averaging.DecentralizedAverager(
        [params.clone()], dht, prefix="kill", target_group_size=replicas, start=True
    )
    print(json.dumps([str(address) for address in dht.get_visible_maddrs()]), flush=True)
    notes = os.open(folder / f"rests-{rank}-{os.getpid()}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    round_ = 0
    while round_ <= deadly:
        for _ in range(period):
            os.write(notes, f"{time.monotonic()}\n".encode())
            time.sleep(step_s)
        control = averager.step(wait=False)
        while control.stage.name not in ("RUNNING_ALLREDUCE", "FINISHED"):
            time.sleep(0.001)
        if round_ == deadly and rank == replicas - 1:
            time.sleep(sending_s)
            (folder / "death-0").write_text(str(time.monotonic()))
            os.killpg(0, signal.SIGKILL)  # its daemon with it, as when a machine goes
        try:
            group = control.result(timeout=limit_s)
        except TimeoutError:
            print(f"round {round_}: no result", flush=True)
            break
        print(f"round {round_}: averaged with {len(group)}", flush=True)
        round_ += 1
    os.write(notes, f"{time.monotonic()}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
