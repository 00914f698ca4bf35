"""Training that goes back to checkpoints, told from the curve of a run without losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def replayed(
    lost_at_s: Iterator[float], iteration_s: float, every: int, restart_s: float
) -> Iterator[tuple[float, int, int]]:
    """Yield (seconds, iterations that count, losses) after each iteration, as CheckFree's authors replay a run.

    The first of every `every` iterations begins with a checkpoint, which takes no time. An iteration in which a stage
    is lost comes to nothing and takes `restart_s` longer for each loss; then only those before the checkpoint count.
    With a loss at the probability q in each of C iterations, (1 - q) (1 - (1 - q)^C) / q of them count on average.
    """
    end_s, counted, saved, done, losses = 0.0, 0, 0, 0, 0
    next_loss_s = next(lost_at_s, np.inf)
    while True:
        if done % every == 0:
            saved = counted
        done, end_s, counted = done + 1, end_s + iteration_s, counted + 1
        while next_loss_s < end_s:
            end_s, counted, losses = end_s + restart_s, saved, losses + 1
            next_loss_s = next(lost_at_s, np.inf)
        yield end_s, counted, losses


def loss_after(curve: Sequence[tuple[float, int, float]], iterations: int) -> float:
    """Return the loss after so many iterations by a curve of (hours, iterations, loss), linear between its points."""
    _, counts, losses = zip(*curve, strict=True)
    return float(np.interp(iterations, counts, losses))
