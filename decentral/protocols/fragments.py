"""What to send: fragments, the parts into which the flat vector is cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.naming import Kind
from decentral.state import Layout


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some spans (start, stop) of the flat vector, in ascending order."""

    spans: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def tensors(self, layout: Layout) -> list[tuple[int, int]]:
        """Return the (start, stop) of the parameters it holds, or of their parts, in order."""
        return [
            (max(start, entry.start), min(stop, entry.stop))
            for start, stop in self.spans
            for entry in layout.entries
            if entry.start < stop and start < entry.stop
        ]

    def cut(self, others: Sequence[Fragment]) -> list[Fragment]:
        """Return what it has in common with each of the others that it meets, in their order."""
        common = [
            tuple(
                (max(start, first), min(stop, last))
                for start, stop in self.spans
                for first, last in other.spans
                if start < last and first < stop
            )
            for other in others
        ]
        return [Fragment(spans) for spans in common if spans]

    def read(self, flat: Tensor) -> Tensor:
        """Return the fragment's elements `[size]`: a view if it is one span, a copy if it is several."""
        parts = [flat[start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, flat: Tensor, values: Tensor) -> None:
        """Copy `values` `[size]` into the fragment's place in `flat`."""
        place = 0
        for start, stop in self.spans:
            flat[start:stop].copy_(values[place : place + stop - start])
            place += stop - start


class Cut(Kind):
    """How the flat vector is cut into fragments."""

    called = "cut into fragments"
    built_in: ClassVar[dict[str, type[Cut]]] = {}

    @abstractmethod
    def split(self, layout: Layout) -> list[Fragment]:
        """Return fragments that partition `layout`: every element belongs to exactly one."""


class Whole(Cut):
    """One fragment: the whole model."""

    name = "whole"

    def split(self, layout: Layout) -> list[Fragment]:
        return [Fragment(((0, layout.size),))]


class Layers(Cut):
    """Fragments of `layers` layers each; what stands outside the stack of layers (embedding, head) is one of its own.

    "sequential" takes neighbours, "strided" every n-th layer, so that early layers are never synced all together
    (Streaming DiLoCo, arXiv 2501.18512, section 3).
    """

    name = "layers"
    layers: int = Field(default=3, ge=1)
    """Layers in a fragment."""
    order: Literal["strided", "sequential"] = "strided"
    """Which layers are in a fragment together: every n-th, or neighbours."""

    def split(self, layout: Layout) -> list[Fragment]:
        stack = layout.layers()
        outside = [span for span in layout.blocks() if span not in stack]
        count = -(-len(stack) // self.layers)
        if self.order == "strided":
            groups = [stack[index::count] for index in range(count)]
        else:
            groups = [stack[index * self.layers : (index + 1) * self.layers] for index in range(count)]
        return [Fragment(tuple(group)) for group in groups] + ([Fragment(tuple(outside))] if outside else [])


class Buckets(Cut):
    """Fragments of at most `megabytes` of float32 (a larger layer stays whole), as PyTorch's DDP reduces gradients."""

    name = "buckets"
    megabytes: float = Field(default=25.0, gt=0)
    """Size of a bucket in MiB of float32 elements."""

    def split(self, layout: Layout) -> list[Fragment]:
        limit = int(self.megabytes * 2**20 / 4)
        spans: list[tuple[int, int]] = []
        for entry in layout.entries:
            if spans and entry.stop - spans[-1][0] <= limit:
                spans[-1] = (spans[-1][0], entry.stop)
            else:
                spans.append((entry.start, entry.stop))
        return [Fragment((span,)) for span in spans]


class Balanced(Cut):
    """So many fragments of about equal size, each of whole tensors: the largest first, each to the smallest fragment.

    As in Decoupled DiLoCo (arXiv 2604.21428). A model with fewer tensors has as many fragments as tensors.
    """

    name = "balanced"
    count: int = Field(default=24, ge=1)
    """Fragments (P)."""

    def split(self, layout: Layout) -> list[Fragment]:
        held = [0] * self.count
        bins: list[list[tuple[int, int]]] = [[] for _ in held]
        for entry in sorted(layout.entries, key=lambda entry: entry.start - entry.stop):
            smallest = held.index(min(held))
            held[smallest] += entry.stop - entry.start
            bins[smallest].append((entry.start, entry.stop))
        return [Fragment(tuple(sorted(spans))) for spans in bins if spans]


def require_partition(fragments: Sequence[Fragment], layout: Layout) -> None:
    """Raise `ConfigError` unless every element of `layout` belongs to exactly one fragment."""
    spans = sorted(span for fragment in fragments for span in fragment.spans)
    place = 0
    for start, stop in spans:
        if start != place or stop <= start:
            raise ConfigError(f"fragments must partition the {layout.size} parameters; element {place} is wrong")
        place = stop
    if place != layout.size:
        raise ConfigError(f"fragments cover {place} of {layout.size} parameters; they must cover all")


Cut.built_in.update({cut.name: cut for cut in (Whole, Layers, Buckets, Balanced)})
CUTS = Cut.built_in
