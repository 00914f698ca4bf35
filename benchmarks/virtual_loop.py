"""Speed of the virtual clock and of the network on it, with no training in the way.

Run from the repository's root (about half a minute; other work on the machine shows in the spread):

    python -m benchmarks.virtual_loop

Prints the median of 5 runs with minimum and maximum. A sleep is one `await asyncio.sleep(...)` of a task, wake-up
included; building and ending the tasks counts too.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable

from decentral.sim.clock import VirtualLoop
from decentral.sim.network import Flow, Network

REPEATS = 5
SLEEPS = 100_000
PAIR_NODES = 1_000
PAIR_ROUNDS = 20
CLIQUE_NODES = 32
CLIQUE_ROUNDS = 2
MIB = 2**20


async def sleep_often(times: int, period_s: float) -> None:
    """Sleep `times` times for `period_s` virtual seconds."""
    for _ in range(times):
        await asyncio.sleep(period_s)


def run_sleepers(tasks: int) -> int:
    """Let `tasks` tasks sleep SLEEPS times in all, each with a period of its own; return the number of sleeps."""

    async def main() -> None:
        await asyncio.gather(*(sleep_often(SLEEPS // tasks, 1.0 + task / tasks) for task in range(tasks)))

    loop = VirtualLoop()
    loop.run_until_complete(main())
    loop.close()
    return SLEEPS


def send(network: Network, loop: VirtualLoop, src: int, dst: int, nbytes: int) -> asyncio.Future[Flow]:
    """Begin a transfer and return the future of its arrival."""
    arrived: asyncio.Future[Flow] = loop.create_future()
    network.transfer(src, dst, nbytes, arrived.set_result)
    return arrived


def make_network(loop: VirtualLoop, nodes: int) -> Network:
    """Build nodes with 100 Mbit/s to 1 Gbit/s each way, 20 ms apart."""
    rng = random.Random(nodes)
    up_bps, down_bps = ([rng.uniform(1e8, 1e9) for _ in range(nodes)] for _ in range(2))
    return Network(loop, up_bps=up_bps, down_bps=down_bps, latency_s=lambda src, dst: 0.02)


def run_pairs() -> int:
    """Gossip: every node waits for a time of its own, exchanges 1 MiB with its partner, and again."""
    loop = VirtualLoop()
    network = make_network(loop, PAIR_NODES)

    async def drive_pair(one: int, rng: random.Random) -> None:
        for _ in range(PAIR_ROUNDS):
            await asyncio.sleep(rng.expovariate(1.0))
            await asyncio.gather(send(network, loop, one, one + 1, MIB), send(network, loop, one + 1, one, MIB))

    async def main() -> None:
        await asyncio.gather(*(drive_pair(one, random.Random(one)) for one in range(0, PAIR_NODES, 2)))

    loop.run_until_complete(main())
    loop.close()
    return PAIR_NODES * PAIR_ROUNDS


def run_all_to_all(spread: int) -> int:
    """Everybody sends 1 MiB, or up to `spread` bytes more, to everybody else at once.

    Without a spread many flows end together; with one each ends at a time of its own, the worst case for the network.
    """
    loop = VirtualLoop()
    network = make_network(loop, CLIQUE_NODES)
    rng = random.Random(0)
    pairs = [(src, dst) for src in range(CLIQUE_NODES) for dst in range(CLIQUE_NODES) if src != dst]

    async def main() -> None:
        for _ in range(CLIQUE_ROUNDS):
            await asyncio.gather(*(send(network, loop, src, dst, MIB + rng.randint(0, spread)) for src, dst in pairs))

    loop.run_until_complete(main())
    loop.close()
    return len(pairs) * CLIQUE_ROUNDS


def report(name: str, unit: str, run: Callable[[], int]) -> None:
    """Print how many units a second `run` does."""
    per_second = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        done = run()
        per_second.append(done / (time.perf_counter() - start))
    median, low, high = statistics.median(per_second), min(per_second), max(per_second)
    print(f"{name:<34} {median:>9,.0f} {unit}/s   ({low:,.0f} to {high:,.0f})")


def main() -> None:
    """Print the table."""
    for tasks in (1, 100, 10_000):
        report(f"{tasks:,} sleeping tasks", "sleeps", lambda tasks=tasks: run_sleepers(tasks))  # type: ignore[misc]
    report(f"pairs among {PAIR_NODES:,} nodes", "flows", run_pairs)
    report(f"all-to-all of {CLIQUE_NODES}, equal sizes", "flows", lambda: run_all_to_all(0))
    report(f"all-to-all of {CLIQUE_NODES}, sizes differ", "flows", lambda: run_all_to_all(MIB))


if __name__ == "__main__":
    main()
