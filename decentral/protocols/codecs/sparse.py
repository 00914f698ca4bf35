"""`Sparse`: codecs that keep the largest elements of each row of a vector, and say which."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor

from decentral.protocols.codecs.bits import MAX_WIDTH, pack_bits, packed_bytes, unpack_bits
from decentral.protocols.codecs.codec import Codec
from decentral.protocols.codecs.dense import Float32
from decentral.wire import FrameError

SLICE = 1 << 18
"""Elements that are looked at together: what is made of them for a moment fits into the cache."""


class Rows(NamedTuple):
    """`number` neighbouring rows of `length` elements, of each of which `kept` travel."""

    number: int
    length: int
    kept: int

    @property
    def width(self) -> int:
        """Bits of an index in a row."""
        return (self.length - 1).bit_length()

    @property
    def as_bitmap(self) -> bool:
        """Whether a bit for each element takes less than an index for each that travels."""
        return self.length < self.kept * self.width

    @property
    def whole_bytes(self) -> bool:
        """Whether a row's indices take whole bytes: rows packed together are then the same bytes as apart."""
        return not (self.length if self.as_bitmap else self.kept * self.width) % 8

    @property
    def index_bytes(self) -> int:
        """Bytes that say which elements travel; none if all do."""
        if self.kept == self.length:
            return 0
        if self.as_bitmap:
            return packed_bytes(self.number * self.length, 1)
        return packed_bytes(self.number * self.kept, self.width)


class Sparse(Codec):
    """Keeps the largest elements by magnitude of each row; ties go to the lower index.

    The payload is the values of what is kept, row by row, as another codec packs them, then for each run of equal rows
    the indices in ascending order, of as many bits as a row asks for, or a bit an element where that is shorter.
    """

    loss = "contractive"
    values: Codec = Float32()
    """How the values of what is kept travel."""

    @field_validator("values")
    @classmethod
    def _every_value_arrives(cls, values: Codec) -> Codec:
        if values.loss not in ("none", "rounding") or type(values).coder is not Codec.coder:
            raise ValueError(
                f"'{values.spelling()}' leaves values out or has a memory, and cannot carry those of a sparse vector; "
                "choose one such as 'sign_magnitude', 'int8' or 'float32'"
            )
        return values

    @abstractmethod
    def rows(self, numel: int) -> Sequence[Rows]:
        """Return the rows that a vector of `numel` elements is seen as, in order."""

    def wire_bytes(self, numel: int) -> int:
        rows = self.rows(numel)
        return self.values.wire_bytes(_kept(rows)) + sum(each.index_bytes for each in rows)

    def pack(self, values: Tensor, payload: Tensor) -> None:
        batches = _batches(tuple(self.rows(values.numel())))
        kept, chosen = _choose(batches, values)
        kept_payload, indices_payload = self._cut(payload, kept.numel())
        self.values.pack(kept, kept_payload)
        for batch, indices in zip(batches, chosen, strict=True):
            if batch.rows.index_bytes:
                packed = payload.new_empty(batch.rows.index_bytes)
                _pack_indices(indices, batch.rows, packed)
                spread(packed, indices_payload, batch.indices)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        rows = tuple(self.rows(values.numel()))
        batches, kept = _batches(rows), values.new_empty(_kept(rows))
        kept_payload, indices_payload = self._cut(payload, kept.numel())
        self.values.unpack(kept_payload, kept)
        chosen = [_unpack_indices(together(indices_payload, batch.indices), batch.rows) for batch in batches]
        _place(batches, kept, chosen, values)

    def round_trip(self, values: Tensor) -> Tensor:
        if not isinstance(values, Tensor):
            return super().round_trip(values)
        arrived = self.travelled(values.detach().to(torch.float32).reshape(-1))
        self.require_finite(arrived)
        return arrived.view(values.shape)

    def travelled(self, values: Tensor) -> Tensor:
        """Return what a receiver will find of `values` `[n]` float32: no index is packed for that."""
        batches = _batches(tuple(self.rows(values.numel())))
        kept, chosen = _choose(batches, values)
        arrived = torch.empty_like(values)
        _place(batches, self.values.round_trip(kept), chosen, arrived)
        return arrived

    def _cut(self, payload: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Return the parts of a payload: of so many values, and of the indices."""
        end = self.values.wire_bytes(kept)
        return payload[:end], payload[end:]

    def _grain_of_rows(self, rows: Rows) -> int:
        """Return the elements in as many such rows as it takes to fill whole grains of `values`."""
        grain = self.values.grain
        return rows.length * (grain // gcd(grain, rows.kept)) if grain else 0


def largest(rows: Tensor, kept: int) -> Tensor:
    """Return the indices of the `kept` largest |x| of each row of `[m, n]`, `[m, kept]`, ascending.

    Ties go to the lower index; NaN counts as the largest of all, so that the receiver notices it.
    """
    length = rows.shape[1]
    if kept == length:
        return torch.arange(length, device=rows.device).expand(rows.shape)
    # Magnitudes order like their bit patterns. With the index behind the pattern no two keys are equal.
    backwards = torch.arange(length - 1, -1, -1, device=rows.device)
    found = torch.empty(len(rows), kept, dtype=torch.int64, device=rows.device)
    step = max(1, SLICE // length)
    for start in range(0, len(rows), step):
        keys = rows[start : start + step].view(torch.int32).bitwise_and(0x7FFFFFFF).to(torch.int64)
        keys.bitwise_left_shift_(MAX_WIDTH).bitwise_or_(backwards)
        found[start : start + step] = keys.topk(kept, dim=1, sorted=False).indices
    return found.sort(dim=1).values


def _kept(rows: Sequence[Rows]) -> int:
    return sum(each.number * each.kept for each in rows)


class _Batch(NamedTuple):
    """Rows alike, and where they are: spans of the vector, of what is kept of it, and of the packed indices."""

    rows: Rows
    elements: tuple[slice, ...]
    kept: tuple[slice, ...]
    indices: tuple[slice, ...]

    def and_then(self, other: _Batch) -> _Batch:
        """Return these rows and others of their kind."""
        rows = self.rows._replace(number=self.rows.number + other.rows.number)
        return _Batch(rows, self.elements + other.elements, self.kept + other.kept, self.indices + other.indices)


@lru_cache(maxsize=256)
def _batches(rows: tuple[Rows, ...]) -> tuple[_Batch, ...]:
    """Return the rows with those alike together: small ones are many. Several fit into the cache together."""
    batches: list[_Batch] = []
    latest: dict[Rows, int] = {}
    start = kept = index = 0
    for each in rows:
        ends = start + each.number * each.length, kept + each.number * each.kept, index + each.index_bytes
        spans = ((slice(begin, end),) for begin, end in zip((start, kept, index), ends, strict=True))
        batch, kind = _Batch(each, *spans), each._replace(number=1)
        start, kept, index = ends
        place = latest.get(kind)
        joined = None if place is None or not each.whole_bytes else batches[place].and_then(batch)
        if place is None or joined is None or joined.rows.number * each.length > SLICE:
            latest[kind] = len(batches)
            batches.append(batch)
        else:
            batches[place] = joined
    return tuple(batches)


def together(vector: Tensor, spans: Sequence[slice]) -> Tensor:
    """Return the spans of a vector one after the other: a view of it if there is but one."""
    return vector[spans[0]] if len(spans) == 1 else torch.cat([vector[span] for span in spans])


def spread(values: Tensor, vector: Tensor, spans: Sequence[slice]) -> None:
    """Undo `together`: write the values into the spans of a vector."""
    if len(spans) == 1:
        vector[spans[0]] = values
        return
    sizes = [span.stop - span.start for span in spans]
    for span, part in zip(spans, values.split_with_sizes(sizes), strict=True):
        vector[span] = part


def _choose(batches: Sequence[_Batch], values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return what is kept of `values` `[n]`, and for each batch the indices in its rows, `[number, kept]`."""
    kept, chosen = values.new_empty(_kept([batch.rows for batch in batches])), []
    for batch in batches:
        part = together(values, batch.elements).view(batch.rows.number, batch.rows.length)
        chosen.append(largest(part, batch.rows.kept))
        spread(part.gather(1, chosen[-1]).view(-1), kept, batch.kept)
    return kept, chosen


def _place(batches: Sequence[_Batch], kept: Tensor, chosen: Sequence[Tensor], values: Tensor) -> None:
    """Write what `_choose` kept to where it was in `values` `[n]`, and zeros elsewhere."""
    values.zero_()
    for batch, indices in zip(batches, chosen, strict=True):
        part, found = together(values, batch.elements), together(kept, batch.kept).view_as(indices)
        part.view(batch.rows.number, batch.rows.length).scatter_(1, indices, found)
        if len(batch.elements) > 1:  # otherwise it is a view
            spread(part, values, batch.elements)


def _pack_indices(indices: Tensor, rows: Rows, payload: Tensor) -> None:
    if rows.as_bitmap:
        bitmap = torch.zeros(rows.number, rows.length, dtype=torch.uint8, device=indices.device)
        pack_bits(bitmap.scatter_(1, indices, 1).view(-1), 1, payload)
    else:
        pack_bits(indices.view(-1), rows.width, payload)


def _unpack_indices(payload: Tensor, rows: Rows) -> Tensor:
    """Return `[number, kept]` int64; raises `FrameError` unless each row ascends and ends within the row."""
    if rows.kept == rows.length:
        return torch.arange(rows.length, device=payload.device).expand(rows.number, rows.length)
    if rows.as_bitmap:
        return _unpack_bitmap(payload, rows)
    indices = unpack_bits(payload, rows.width, rows.number * rows.kept).view(rows.number, rows.kept)
    # signed: uint8 differences wrap
    steps = indices[:, 1:].to(torch.int32) - indices[:, :-1].to(torch.int32)
    if bool((steps <= 0).any()) or bool((indices[:, -1] >= rows.length).any()):
        raise FrameError("index", f"the indices in a row do not ascend, or go beyond its {rows.length} elements")
    return indices.to(torch.int64)


def _unpack_bitmap(payload: Tensor, rows: Rows) -> Tensor:
    bitmap = unpack_bits(payload, 1, rows.number * rows.length).view(rows.number, rows.length)
    if bool((bitmap.sum(dim=1) != rows.kept).any()):
        raise FrameError("index", f"a row of the bitmap does not mark {rows.kept} of {rows.length} elements")
    return bitmap.nonzero()[:, 1].view(rows.number, rows.kept)
