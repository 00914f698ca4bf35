"""One of hivemind's processes for `benchmarks.all_reduce`; runs in hivemind's environment.

Arguments: rank, peers, number of elements, addresses of the first process. Prints its addresses; then, told "meet",
forms a group; told "go" or "last", takes the mean and prints when it began and ended.
"""

from __future__ import annotations

import json
import sys
import time

import hivemind
import torch
from hivemind.utils import get_dht_time


def main() -> None:
    torch.set_num_threads(1)
    rank, peers, numel = map(int, sys.argv[1:4])
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=sys.argv[4:])
    averager = hivemind.averaging.DecentralizedAverager(
        [torch.full((numel,), float(rank))],
        dht,
        prefix="bench",
        target_group_size=peers,
        min_group_size=peers,
        min_matchmaking_time=1.0,
        request_timeout=0.5,
        start=True,
    )
    print(json.dumps([str(address) for address in dht.get_visible_maddrs()]), flush=True)
    word = ""
    while word != "last":
        sys.stdin.readline()
        control = averager.step(wait=False, require_trigger=True, scheduled_time=get_dht_time() + 1.0, timeout=60.0)
        while control.stage.name != "AWAITING_TRIGGER":
            time.sleep(0.01)
        print("[]", flush=True)
        word = sys.stdin.readline().strip()
        began = time.monotonic()
        control.allow_allreduce()
        assert control.result(timeout=60.0) is not None
        print(json.dumps([began, time.monotonic()]), flush=True)
    averager.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
