"""One replica's parameters as one flat vector, with the model's tensors as views of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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

    def shapes(self, spans: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """Return the shapes of the parameters that lie in the spans, in order; one that is cut counts as a vector."""
        shapes: list[tuple[int, ...]] = []
        for start, stop in spans:
            for entry in self.entries:
                if entry.start >= start and entry.stop <= stop:
                    shapes.append(entry.shape)
                elif entry.start < stop and start < entry.stop:
                    shapes.append((min(stop, entry.stop) - max(start, entry.start),))
        return shapes

    def blocks(self) -> list[tuple[int, int]]:
        """Return the (start, stop) of each layer, in order; what belongs to no layer stands by itself between them.

        A layer is what one index of the model's largest module list holds (`blocks.3.attention.weight`), as in
        Hugging Face and torchvision models.
        """
        return [span for span, _layer in self._cut()]

    def layers(self) -> list[tuple[int, int]]:
        """Return those of `blocks` that are layers."""
        return [span for span, layer in self._cut() if layer is not None]

    def matrices(self) -> list[tuple[int, int, int]]:
        """Return (start, rows, columns) of the layers' weight matrices; a convolution has a row for each output."""
        layers = self.layers()
        return [
            (entry.start, entry.shape[0], (entry.stop - entry.start) // entry.shape[0])
            for entry in self.entries
            if len(entry.shape) > 1 and any(start <= entry.start < stop for start, stop in layers)
        ]

    def _cut(self) -> list[tuple[tuple[int, int], str | None]]:
        """Return the blocks, each with the index of its layer, None for what belongs to no layer."""
        places = [_places(entry.name) for entry in self.entries]
        indices: dict[str, set[str]] = {}
        held: dict[str, int] = {}
        for entry, place in zip(self.entries, places, strict=True):
            for name, index in place.items():
                indices.setdefault(name, set()).add(index)
                held[name] = held.get(name, 0) + entry.stop - entry.start
        # One index alone is a number in a name (`gpt2.h.3`) rather than a list, if there is anything else.
        stack = max(held, key=lambda name: (len(indices[name]) > 1, held[name]), default="")
        blocks: list[tuple[tuple[int, int], str | None]] = []
        for entry, place in zip(self.entries, places, strict=True):
            layer = place.get(stack)
            if blocks and blocks[-1][1] == layer:
                blocks[-1] = ((blocks[-1][0][0], entry.stop), layer)
            else:
                blocks.append(((entry.start, entry.stop), layer))
        return blocks


def _places(name: str) -> dict[str, str]:
    """Return the indices in a parameter's name by what stands before them, outermost first."""
    return {name[: match.start()].rstrip("."): match[0] for match in re.finditer(r"\d+(?=\.)", name)}


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of the model's trainable parameters; tied ones count once.

    Raises `TaskError` when there are none, or when one is not float32: merging happens in float32, and mixed precision
    is autocast's business.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise TaskError(
                f"task.model(): parameter '{name}' is {parameter.dtype}; trainable parameters must be torch.float32 "
                "(use torch.autocast inside the model for mixed precision)"
            )
    if not trainable:
        raise TaskError("task.model(): the model has no trainable parameters")
    return laid_out({name: tuple(parameter.shape) for name, parameter in trainable.items()})


def laid_out(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return the layout of parameters of these names and shapes, at least one, in their order."""
    entries: list[Entry] = []
    place = 0
    for name, shape in shapes.items():
        entries.append(Entry(name, shape, place, place + math.prod(shape)))
        place = entries[-1].stop
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
