"""`Sparse`: codecs that keep the largest elements of each row of a vector, and say which."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor

from decentral.protocols.codecs.bits import MAX_WIDTH, pack_bits, packed_bytes, unpack_bits
from decentral.protocols.codecs.codec import Codec, CodecField
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
    values: CodecField = Float32()
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
        rows = self.rows(values.numel())
        kept, end = [values[:0]], self.values.wire_bytes(_kept(rows))
        indices_payload = payload[end:]
        for each, part in _parts(rows, values):
            if each.kept == each.length:
                kept.append(part.reshape(-1))
                continue
            indices = largest(part, each.kept)
            kept.append(part.gather(1, indices).view(-1))
            _pack_indices(indices, each, indices_payload[: each.index_bytes])
            indices_payload = indices_payload[each.index_bytes :]
        self.values.pack(torch.cat(kept), payload[:end])

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        rows = self.rows(values.numel())
        end = self.values.wire_bytes(_kept(rows))
        kept = torch.empty(_kept(rows), dtype=torch.float32, device=values.device)
        self.values.unpack(payload[:end], kept)
        values.zero_()
        indices_payload = payload[end:]
        for each, part in _parts(rows, values):
            mine, kept = kept[: each.number * each.kept], kept[each.number * each.kept :]
            if each.kept == each.length:
                part.copy_(mine.view_as(part))
            elif each.as_bitmap:
                part[_unpack_bitmap(indices_payload[: each.index_bytes], each)] = mine
            else:
                part.scatter_(1, _unpack_indices(indices_payload[: each.index_bytes], each), mine.view(-1, each.kept))
            indices_payload = indices_payload[each.index_bytes :]

    def _grain_of_rows(self, rows: Rows) -> int:
        """Return the elements in as many such rows as it takes to fill whole grains of `values`."""
        grain = self.values.grain
        return rows.length * (grain // gcd(grain, rows.kept)) if grain else 0


def largest(rows: Tensor, kept: int) -> Tensor:
    """Return the indices of the `kept` largest |x| of each row of `[m, n]`, `[m, kept]`, ascending.

    Ties go to the lower index; NaN counts as the largest of all, so that the receiver notices it.
    """
    length = rows.shape[1]
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


def _parts(rows: Sequence[Rows], values: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Yield all rows with their elements, `[number, length]` views of `values`."""
    start = 0
    for each in rows:
        stop = start + each.number * each.length
        yield each, values[start:stop].view(each.number, each.length)
        start = stop


def _pack_indices(indices: Tensor, rows: Rows, payload: Tensor) -> None:
    if rows.as_bitmap:
        bitmap = torch.zeros(rows.number, rows.length, dtype=torch.uint8, device=indices.device)
        pack_bits(bitmap.scatter_(1, indices, 1).view(-1), 1, payload)
    else:
        pack_bits(indices.view(-1), rows.width, payload)


def _unpack_bitmap(payload: Tensor, rows: Rows) -> Tensor:
    """Return `[number, length]` bool; raises `FrameError` unless each row has as many ones as values."""
    bitmap = unpack_bits(payload, 1, rows.number * rows.length).view(rows.number, rows.length)
    if bool((bitmap.sum(dim=1) != rows.kept).any()):
        raise FrameError("index", f"a row of the bitmap does not mark {rows.kept} of {rows.length} elements")
    return bitmap.bool()


def _unpack_indices(payload: Tensor, rows: Rows) -> Tensor:
    """Return `[number, kept]` int64; raises `FrameError` unless each row ascends and ends within the row."""
    indices = unpack_bits(payload, rows.width, rows.number * rows.kept).view(rows.number, rows.kept)
    # signed: uint8 differences wrap
    steps = indices[:, 1:].to(torch.int32) - indices[:, :-1].to(torch.int32)
    if bool((steps <= 0).any()) or bool((indices[:, -1] >= rows.length).any()):
        raise FrameError("index", f"the indices in a row do not ascend, or go beyond its {rows.length} elements")
    return indices.to(torch.int64)
