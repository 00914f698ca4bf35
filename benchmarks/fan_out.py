"""How optimistic "size / bandwidth" is: one node sends 100 MiB to each of n nodes at once.

Run from the repository's root (a second):

    python -m benchmarks.fan_out

For each n it prints how many times too optimistic size / bandwidth is: the time of the burst on the max-min fair
network divided by size / bandwidth of one transfer, where the bandwidth of a path is that of its slowest link. The
ratio is n when all links are equal; an uplink ten times as fast as the downlinks hides the burst until n passes ten.
Between cloud regions, as measured, each pair has a cap of its own beside the sender's network card; what hides the
burst there is that the card is wider than one pair's cap. At home the uplink is the narrowest of all.
"""

from __future__ import annotations

import asyncio

from decentral.fleet import Fleet, WorkerGroup
from decentral.sim.clock import VirtualLoop
from decentral.sim.links import Links
from decentral.sim.network import Flow, Network

NBYTES = 100 * 2**20
DOWN_BPS = 1e8
FANS = (1, 2, 4, 8, 10, 16, 32, 100)
SENDER, RECEIVERS = "aws:us-east-1", "gcp:europe-west4-a"


def burst_s(loop: VirtualLoop, network: Network, receivers: int) -> float:
    """Return the virtual seconds until all receivers have their bytes from node 0."""

    async def main() -> None:
        arrivals: list[asyncio.Future[Flow]] = [loop.create_future() for _ in range(receivers)]
        for node, arrival in enumerate(arrivals, start=1):
            network.transfer(0, node, NBYTES, arrival.set_result)
        await asyncio.gather(*arrivals)

    loop.run_until_complete(main())
    loop.close()
    return loop.time()


def plain_ratio(receivers: int, up_bps: float) -> float:
    """Return the ratio where every uplink has `up_bps` and every downlink DOWN_BPS."""
    loop, nodes = VirtualLoop(), receivers + 1
    network = Network(loop, up_bps=[up_bps] * nodes, down_bps=[DOWN_BPS] * nodes, latency_s=lambda src, dst: 0.0)
    return burst_s(loop, network, receivers) / (8 * NBYTES / min(up_bps, DOWN_BPS))


def site_ratio(receivers: int, source: str, to: str) -> float:
    """Return the ratio from one machine at a site to machines at another one; latencies do not count."""
    loop = VirtualLoop()
    fleet = Fleet(workers=(WorkerGroup(site=source), WorkerGroup(count=receivers, site=to)))
    links = Links(fleet, 0, loop.time)
    network = Network(loop, **{**links.options(), "latency_s": lambda src, dst: 0.0})
    paths = [min(links.up_bps[0], links.down_bps[node], links.pair_bps(0, node)) for node in range(1, receivers + 1)]
    return burst_s(loop, network, receivers) / (8 * NBYTES / min(paths))


def main() -> None:
    """Print the table."""
    print("size / bandwidth is so many times too optimistic:")
    print(f"{'receivers':>9} {'equal links':>12} {'10x uplink':>11} {'cloud regions':>14} {'homes':>6}")
    for receivers in FANS:
        equal, wide = (plain_ratio(receivers, up_bps) for up_bps in (DOWN_BPS, 10 * DOWN_BPS))
        cloud, homes = site_ratio(receivers, SENDER, RECEIVERS), site_ratio(receivers, "home", "home")
        print(f"{receivers:>9} {equal:>12.2f} {wide:>11.2f} {cloud:>14.2f} {homes:>6.2f}")


if __name__ == "__main__":
    main()
