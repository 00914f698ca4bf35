"""How large what a run holds is at least."""

from __future__ import annotations

import torch

from decentral.config import Run
from decentral.errors import TaskError
from decentral.pipeline.memory import FLOAT32_BYTES, state_bytes


def parameters(run: Run) -> int:
    """Return how many trainable parameters the whole model has; raises `TaskError` for a model that cannot be made."""
    try:
        with torch.device("meta"):
            model = run.make_task().model()
    except Exception as error:  # a task may raise what it likes
        raise TaskError(f"the run's model cannot be made: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def worker_bytes(run: Run) -> int:
    """Return how much memory a worker needs at least: parameters, gradients, running means, and a vector to send.

    What the rule remembers, activations and batches come on top.
    """
    size = parameters(run)
    return (sum(state_bytes(run.inner, size).values()) + FLOAT32_BYTES * size) // run.pipeline.stages


def checkpoint_bytes(run: Run) -> int:
    """Return how large a checkpoint is about: three vectors once, as DiLoCo has, and running means of each replica."""
    size = parameters(run)
    return 3 * FLOAT32_BYTES * size + run.replicas * state_bytes(run.inner, size)["inner optimiser"]


def human(nbytes: float) -> str:
    """Return a size as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
