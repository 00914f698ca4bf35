"""What the blocks of a model take on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decentral.pipeline.cut import Inputs
from decentral.pipeline.memory import remembered
from decentral.replica import initial_model
from decentral.task import Task, to_device

WARM_UPS, REPEATS = 2, 7


def measure_blocks(task: Task, seed: int, samples: int, device: torch.device) -> list[float]:
    """Return the seconds that each block of the task's model takes there and back for so many samples: medians.

    The loss is not in it. Raises `TaskError` if the model is no sequence of blocks.
    """
    blocks, inputs = _blocks(task, seed, samples, device)
    turns = [_turn(blocks, inputs) for _ in range(WARM_UPS + REPEATS)]
    return [statistics.median(taken) for taken in zip(*turns[WARM_UPS:], strict=True)]


def measure_memory(task: Task, seed: int, samples: int, device: torch.device) -> list[int]:
    """Return the bytes that each block remembers there of so many samples until it has gone back. Raises as above."""
    return remembered(*_blocks(task, seed, samples, device))


def _blocks(task: Task, seed: int, samples: int, device: torch.device) -> tuple[Sequence[nn.Module], Tensor]:
    """Return the blocks of the task's model on the device, and what goes into the first one."""
    model = initial_model(task, seed).to(device).train()
    with torch.no_grad():
        return task.blocks(model), Inputs().of(task, to_device(task.batch(0, 0, samples), device))


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
