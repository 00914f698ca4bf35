"""One replica's parameters as one flat vector, with the model's tensors as views of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decentral.errors import TaskError


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one parameter lies in the flat vector: elements `start .. stop - 1`, in row-major order."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and places of a model's parameters in a flat vector of `size` elements, without gaps."""

    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        return self.entries[-1].stop

    def blocks(self) -> list[tuple[int, int]]:
        """Return the (start, stop) of each layer, in order; what belongs to no layer stands by itself between them.

        A layer is what one index of the model's largest module list holds (`blocks.3.attention.weight`), as in
        Hugging Face and torchvision models.
        """
        keys = [_layer(entry.name) for entry in self.entries]
        held: dict[str, int] = {}
        for entry, key in zip(self.entries, keys, strict=True):
            if key:
                held[key[0]] = held.get(key[0], 0) + entry.stop - entry.start
        stack = max(held, key=lambda name: held[name], default=None)
        spans: list[tuple[int, int]] = []
        previous: object = object()
        for entry, key in zip(self.entries, keys, strict=True):
            block = key if key and key[0] == stack else None
            if spans and block == previous:
                spans[-1] = (spans[-1][0], entry.stop)
            else:
                spans.append((entry.start, entry.stop))
            previous = block
        return spans


def _layer(name: str) -> tuple[str, str] | None:
    match = re.match(r"(.*?)\.?(\d+)\.", name)
    return (match[1], match[2]) if match else None


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of the model's trainable parameters; tied ones count once.

    Raises `TaskError` when there are none, or when one is not float32: merging happens in float32, and mixed precision
    is autocast's business.
    """
    entries: list[Entry] = []
    place = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise TaskError(
                f"task.model(): parameter '{name}' is {parameter.dtype}; trainable parameters must be torch.float32 "
                "(use torch.autocast inside the model for mixed precision)"
            )
        entries.append(Entry(name, tuple(parameter.shape), place, place + math.prod(parameter.shape)))
        place = entries[-1].stop
    if place == 0:
        raise TaskError("task.model(): the model has no trainable parameters")
    return Layout(tuple(entries))


def bind(model: nn.Module, layout: Layout, params: Tensor, grads: Tensor) -> None:
    """Move the model's parameters into `params` and its gradients into `grads` (both `[layout.size]` float32)."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for entry in layout.entries:
            parameter = named[entry.name]
            view = params[entry.start : entry.stop].view(entry.shape)
            view.copy_(parameter)
            parameter.data = view
            parameter.grad = grads[entry.start : entry.stop].view(entry.shape)
