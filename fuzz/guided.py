"""Frames led by coverage, with atheris (the extra `fuzz`): `python -m fuzz.guided -max_total_time=300`.

Options are libFuzzer's; a frame that breaks something is kept below `runs/fuzz`, and is tried again by its file name.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["decentral"]):
    from fuzz import frames

FOUND = Path("runs") / "fuzz"
REPORT_EVERY = 100_000
HONEST = frames.honest()
verdicts: Counter[str] = Counter()


def judge(data: bytes) -> None:
    """Count what comes of a frame. An exception is what the fuzzer looks for."""
    verdicts[frames.judge(data)] += 1
    if sum(verdicts.values()) % REPORT_EVERY == 0:  # libFuzzer ends the process without a last word
        print(f"what came of them: {dict(verdicts.most_common())}", flush=True)


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Spoil a frame in the fuzzer's way or in ours, which keeps lengths right more often and gets further."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        changed: bytes = atheris.Mutate(data, max_size)
        return changed
    return frames.spoiled(data, draw.choice(HONEST), draw)[:max_size]


def main() -> None:
    """Begin with honest frames and follow what reaches new code."""
    torch.set_num_threads(1)
    FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(HONEST):
            (Path(corpus) / str(number)).write_bytes(data)
        limits = [f"-artifact_prefix={FOUND}/", "-max_len=4096", "-timeout=5", "-rss_limit_mb=2048"]
        options = [sys.argv[0], *limits, *sys.argv[1:]]
        replayed = any(not option.startswith("-") for option in sys.argv[1:])
        atheris.Setup(options if replayed else [*options, corpus], judge, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
