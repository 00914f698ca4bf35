"""How much shorter an iteration is when microbatches skip a third of a pipeline's stages, by planned paths.

Run from the repository's root (about three minutes):

    python -m benchmarks.skip_paths [draws]

20 nodes at 12 sites, drawn anew each time, hold 6 stages of 4 layers; `place` says who holds which. Each of the 5
nodes of stage 0 starts 3 microbatches of 8 samples, and a node has memory for 3. Compute and links are those of
SkipPipe's code: forward 0.055 s a sample and layer; sites 3 to 132 ms apart with 0.009 to 0.03 GiB/s, 0.2425 among the
European ones, inside of a site 1 ms and 2 GiB/s; 0.35 s more for every hand-over. Everything is replayed, nothing run.

The full pipeline brings 5 microbatches to a node. With memory for 3 it has to wait, with memory for 5 it has not, and
each way of skipping is compared with both. "Searched" takes all stages too, with memory for 5, in an order and over
nodes that the same search has found. The paper says -50 % of an iteration's time; the schedules that come with its code
say -39 % for random skipping, -56 % without TC2 and -58 % with it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

from decentral.pipeline.skip import Costs, Schedule, SearchEffort, full, place, random_skip, search
from decentral.replica import seed_of

NODES, SITES, EUROPEAN = 20, 12, 4
SIZES = (5, 3, 3, 3, 3, 3)
SLOTS, MEMORY, LENGTH = 3, 3, 4
LAYERS, SAMPLES, WIDTH, CONTEXT = 4, 8, 1024, 1024
DRAWS = 10


def drawn_costs(seed: int) -> Costs:
    """Return nodes at sites, and links between sites, drawn for this seed."""
    chance = random.Random(seed_of(seed, "wide-area links"))
    gibibytes = 4 * WIDTH * CONTEXT * SAMPLES / 2**30
    sites = [[0.35 + 1e-3 + gibibytes / 2.0] * SITES for _ in range(SITES)]
    for one in range(SITES):
        for other in range(one):
            rate = 0.2425 if one < EUROPEAN else chance.uniform(0.009, 0.03)
            sites[one][other] = sites[other][one] = 0.35 + chance.uniform(3e-3, 132e-3) + gibibytes / rate
    at = [chance.randrange(SITES) for _ in range(NODES)]
    return Costs([0.055 * LAYERS * SAMPLES] * NODES, [[sites[one][other] for other in at] for one in at])


def ways(stages: Sequence[Sequence[int]], costs: Costs, seed: int) -> dict[str, Callable[[], Schedule]]:
    """Return what makes the schedules that are compared, by their names in the table."""
    unpolished = SearchEffort(exchanges=0)
    return {
        "full, memory 3": lambda: full(stages, SLOTS, costs, MEMORY),
        "full": lambda: full(stages, SLOTS, costs),
        "full, searched": lambda: search(stages, SLOTS, len(SIZES), 5, costs),
        "random skip": lambda: random_skip(stages, SLOTS, LENGTH, MEMORY, costs, seed),
        "no TC2": lambda: search(stages, SLOTS, LENGTH, MEMORY, costs, part_collisions=False),
        "TC2": lambda: search(stages, SLOTS, LENGTH, MEMORY, costs, effort=unpolished),
        "TC2 and exchanges": lambda: search(stages, SLOTS, LENGTH, MEMORY, costs, seed=seed),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draws", nargs="?", type=int, default=DRAWS, help="how many sets of nodes to draw")
    draws = parser.parse_args().draws
    seconds: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    for seed in range(draws):
        costs, began = drawn_costs(seed), time.process_time()
        stages = place(costs.links, SIZES, seed).stages
        cpu_s.setdefault("placement", []).append(time.process_time() - began)
        for name, way in ways(stages, costs, seed).items():
            began = time.process_time()
            seconds.setdefault(name, []).append(way().makespan_s)
            cpu_s.setdefault(name, []).append(time.process_time() - began)
        print(f"draw {seed}:", ", ".join(f"{name} {times[-1]:.1f}" for name, times in seconds.items()), flush=True)
    print(f"placement: {statistics.median(cpu_s['placement']):.1f} s of CPU")
    print("                    s / iteration   to full, memory 3   to full (least to most)   CPU s")
    for name, times in seconds.items():
        limited = [mine / theirs for mine, theirs in zip(times, seconds["full, memory 3"], strict=True)]
        free = [mine / theirs for mine, theirs in zip(times, seconds["full"], strict=True)]
        spread = f"{statistics.fmean(free):5.3f} ({min(free):.3f} to {max(free):.3f})"
        print(
            f"{name:<18}  {statistics.fmean(times):13.1f}   {statistics.fmean(limited):17.3f}   {spread}    "
            f"{statistics.median(cpu_s[name]):5.1f}"
        )


if __name__ == "__main__":
    main()
