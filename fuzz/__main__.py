"""Spoiled frames at random: `python -m fuzz --frames 1000000 --seconds 600`. A frame that breaks something is kept."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from fuzz.frames import honest, judge, spoiled

FOUND = Path("runs") / "fuzz"


def main() -> None:
    """Judge so many frames, or what the time allows; print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, frames, verdicts, slowest_s = random.Random(options.seed), honest(), Counter[str](), 0.0
    began = time.perf_counter()
    for number in range(options.frames):
        data = spoiled(draw.choice(frames), draw.choice(frames), draw)
        start = time.perf_counter()
        try:
            verdicts[judge(data)] += 1
        except BaseException:
            FOUND.mkdir(parents=True, exist_ok=True)
            kept = FOUND / f"crash-{options.seed}-{number}"
            kept.write_bytes(data)
            print(f"frame {number} of seed {options.seed} broke something; it is in {kept}", file=sys.stderr)
            raise
        now = time.perf_counter()
        slowest_s = max(slowest_s, now - start)
        if now - began > options.seconds:
            break
    total = sum(verdicts.values())
    accepted = verdicts.pop("accepted", 0)
    took_s = time.perf_counter() - began
    print(f"{total} frames of seed {options.seed} in {took_s:.0f} s, the slowest in {1e3 * slowest_s:.1f} ms")
    print(f"{accepted} accepted, {total - accepted} refused:")
    for code, count in verdicts.most_common():
        print(f"  {code:12} {count}")


if __name__ == "__main__":
    main()
