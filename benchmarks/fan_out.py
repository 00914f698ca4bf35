"""How optimistic "size / bandwidth" is: one node sends 100 MiB to each of n nodes at once.

Run from the repository's root (a second):

    python -m benchmarks.fan_out

For each n it prints the time of the burst on the max-min fair network divided by size / bandwidth of one transfer,
where the bandwidth of a path is that of its slowest link. The ratio is n when all links are equal; an uplink ten times
as fast as the downlinks hides the burst until n passes ten.
"""

from __future__ import annotations

import asyncio

from decentral.sim.clock import VirtualLoop
from decentral.sim.network import Flow, Network

NBYTES = 100 * 2**20
DOWN_BPS = 1e8
FANS = (1, 2, 4, 8, 10, 16, 32, 100)


def burst_s(receivers: int, up_bps: float) -> float:
    """Return the virtual seconds until all receivers have their bytes."""
    loop = VirtualLoop()
    nodes = receivers + 1
    network = Network(loop, up_bps=[up_bps] * nodes, down_bps=[DOWN_BPS] * nodes, latency_s=lambda src, dst: 0.0)

    async def main() -> None:
        arrivals: list[asyncio.Future[Flow]] = [loop.create_future() for _ in range(receivers)]
        for node, arrival in enumerate(arrivals, start=1):
            network.transfer(0, node, NBYTES, arrival.set_result)
        await asyncio.gather(*arrivals)

    loop.run_until_complete(main())
    loop.close()
    return loop.time()


def main() -> None:
    """Print the table."""
    print("max-min time / (size / bandwidth)")
    print(f"{'receivers':>9} {'equal links':>12} {'10x uplink':>11}")
    for receivers in FANS:
        ratios = [burst_s(receivers, up_bps) / (8 * NBYTES / DOWN_BPS) for up_bps in (DOWN_BPS, 10 * DOWN_BPS)]
        print(f"{receivers:>9} {ratios[0]:>12.2f} {ratios[1]:>11.2f}")


if __name__ == "__main__":
    main()
