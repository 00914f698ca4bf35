"""What the blocks of a model take on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decentral.pipeline.cut import Inputs
from decentral.replica import initial_model
from decentral.task import Task, to_device

WARM_UPS, REPEATS = 2, 7


def measure_blocks(task: Task, seed: int, samples: int, device: torch.device) -> list[float]:
    """Return the seconds that each block of the task's model takes there and back for so many samples: medians.

    The loss is not in it. Raises `TaskError` if the model is no sequence of blocks.
    """
    model = initial_model(task, seed).to(device).train()
    batch = to_device(task.batch(0, 0, samples), device)
    with torch.no_grad():
        inputs = Inputs().of(task, batch)
    turns = [_turn(task.blocks(model), inputs) for _ in range(WARM_UPS + REPEATS)]
    return [statistics.median(taken) for taken in zip(*turns[WARM_UPS:], strict=True)]


def _turn(blocks: Sequence[nn.Module], values: Tensor) -> list[float]:
    taken = []
    for block in blocks:
        values = values.detach()
        if values.is_floating_point():
            values.requires_grad_()
        began = _now(values)
        out = block(values)
        if out.requires_grad:
            out.backward(torch.ones_like(out))
        taken.append(_now(out) - began)
        values = out
    return taken


def _now(values: Tensor) -> float:
    """Return the time when all that was asked for before is done."""
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    return time.perf_counter()
