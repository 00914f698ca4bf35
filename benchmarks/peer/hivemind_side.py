"""hivemind's averager for `benchmarks.side_by_side`; runs in hivemind's environment. All timeouts are hivemind's own.

Local SGD, for it has no outer optimiser: every so many steps parameters become their mean over the group. Arguments:
rank, replicas, the folder for notes, addresses of the first process. Prints its addresses.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import hivemind
import torch
from side import PERIOD, STEPS, Replica


def main() -> None:
    rank, replicas, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    replica = Replica(rank, replicas, folder)
    parameters = list(replica.model.parameters())
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=sys.argv[4:])
    averager = hivemind.averaging.DecentralizedAverager(
        [parameter.detach().clone() for parameter in parameters],
        dht,
        prefix="side",
        target_group_size=replicas,
        start=True,
    )
    print(json.dumps([str(address) for address in dht.get_visible_maddrs()]), flush=True)
    while replica.step < STEPS:
        for _ in range(PERIOD):
            replica.train()
        with torch.no_grad(), averager.get_tensors() as means:
            for parameter, mean in zip(parameters, means, strict=True):
                mean.copy_(parameter)
        averager.step()
        with torch.no_grad(), averager.get_tensors() as means:
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.copy_(mean)
    replica.finish()
    os._exit(0)


if __name__ == "__main__":
    main()
