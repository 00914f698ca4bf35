"""What being joined costs a training loop between two rounds.

    python -m benchmarks.join_cost

A small GPT (byte GPT of the built-in task, batch 8, AdamW, one thread) is trained by a plain loop, in turn by itself
and joined to a run of one worker that has no round meanwhile, several times, in one process and with one model. Printed
are the ratios of neighbouring turns, in CPU seconds of the whole process, the thread beside the loop included, which
others on the machine disturb least; and what one call of `sync.step()` takes by itself, and one of `sync.step(loss)`.
"""

from __future__ import annotations

import secrets
import socket
import statistics
import time
from collections.abc import Callable

import torch

import decentral
from decentral.config import Run
from decentral.protocols import DiLoCo, Every

STEPS = 20
PAIRS = 9
CALLS = 100_000


def main() -> None:
    torch.set_num_threads(1)
    run = Run()
    task = run.make_task()
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = task.batch(0, 0, run.batch_size)
    loss = task.loss(model, batch)

    def turn(step: Callable[[], object]) -> float:
        began = time.process_time()
        for _ in range(STEPS):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            step()
        return time.process_time() - began

    def joined_turn() -> tuple[float, float, float]:
        """Return the seconds of a turn, and of a single call without a loss and with one."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        never = DiLoCo(period=Every(period=1 << 30))
        secret = secrets.token_hex(16)
        with decentral.join(rule=never, worker=0, workers=1, address=address, secret=secret) as fleet:
            sync = fleet.attach(model, optimizer)
            seconds = turn(sync.step)
            return seconds, call_s(sync.step), call_s(lambda: sync.step(loss))

    def call_s(call: Callable[[], object]) -> float:
        began = time.process_time()
        for _ in range(CALLS):
            call()
        return (time.process_time() - began) / CALLS

    turn(bool)
    pairs = [(turn(bool), *joined_turn()) for _ in range(PAIRS)]
    ratios = sorted(joined / bare for bare, joined, _, _ in pairs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    step_s = statistics.median(bare for bare, *_ in pairs) / STEPS
    print(f"{parameters:,} parameters, a step of {1e3 * step_s:.1f} ms, {PAIRS} pairs of {STEPS} steps")
    print(f"joined over bare: median {statistics.median(ratios):.4f}, from {ratios[0]:.4f} to {ratios[-1]:.4f}")
    for what, which in (("one call", 2), ("one with a loss", 3)):
        median_s = statistics.median(pair[which] for pair in pairs)
        print(f"{what}: {1e9 * median_s:.0f} ns, {100 * median_s / step_s:.5f} % of a step")


if __name__ == "__main__":
    main()
