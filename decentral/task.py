"""What is trained: a `Task` is a model, its batches, a loss and an evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from decentral.errors import TaskError
from decentral.part import Part

Batch = Any
"""A tensor, or a nest of tuples, lists and dicts of tensors."""


class Task(Part):
    """A model and the work to be done on it.

    Every worker builds its own task from the same fields, so a task must be a pure function of them: two workers that
    ask for the same batch get the same tensors. Subclass it, give it fields for whatever is configurable, and name it
    in the run file as `module:Class` (or a function that returns one).

    A class with the field `sample_seed` says that this number chooses its training samples: a comparison over several
    seeds sets it, so that each seed has samples of its own.
    """

    headline: ClassVar[str] = "loss"
    """The key of `evaluate`'s answer that tables and plots show; smaller is better unless `higher_is_better`."""

    higher_is_better: ClassVar[bool] = False

    @property
    def tokens_per_sample(self) -> int | None:
        """How many tokens a sample has, for the simulator's step times on a device; None: samples are no sequences."""
        return None

    @property
    def samples_per_epoch(self) -> int | None:
        """How many samples an epoch has: of worker 0's stream, `n e .. n (e + 1) - 1` are each of them once.

        None: the stream has no epochs, as when samples are drawn with replacement.
        """
        return None

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new model. Called under a fixed seed, so that every worker starts from equal weights."""

    @abstractmethod
    def batch(self, worker: int, start: int, size: int) -> Batch:
        """Return the samples `start .. start + size - 1` of `worker`'s own endless stream, on the CPU."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the batch: a scalar that `backward()` can be called on."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the parts that the model's call runs one after the other, each on the one tensor that the last made.

        A pipeline cuts the model between them. Raises `TaskError` if the model is no such sequence; an `nn.Sequential`
        is one, other models say so by overriding this.
        """
        if isinstance(model, nn.Sequential):
            return list(model)
        raise TaskError(
            f"task.model() is a {type(model).__name__}, and a pipeline cuts a sequence of blocks: return an "
            "nn.Sequential, or override task.blocks"
        )

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return held-out metrics, `"loss"` among them. The model is in eval mode and gradients are off."""

    def predictions(self, model: nn.Module) -> Tensor | None:
        """Return log-probabilities of the classes for each held-out item, [items, classes] float32.

        `decentral compare` tells by them how far replicas disagree. The model is in eval mode and gradients are off.
        None: the task does not predict classes, or does not say.
        """
        return None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor in it on `device`."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
