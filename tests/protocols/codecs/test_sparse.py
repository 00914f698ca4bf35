"""The payload of sparse codecs, byte for byte, where a vector is seen as rows of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from board import normals, payload_of

from decentral.protocols.codecs.sparse import Rows, Sparse

RUNS = [
    Rows(2, 64, 8),
    Rows(3, 10, 10),
    Rows(1, 64, 8),
    Rows(4, 24, 20),
    Rows(1, 24, 20),
    Rows(3, 40, 3),
    Rows(2, 40, 3),
]
"""Of a row 8 indices of 6 bits each, all, 24 bits of a bitmap, and 3 indices of 6 bits, which are no whole bytes."""
NUMEL = sum(rows.number * rows.length for rows in RUNS)


class Ragged(Sparse):
    name: ClassVar[str] = ""

    def rows(self, numel: int) -> Sequence[Rows]:
        return RUNS


def as_bytes(bits: str) -> list[int]:
    """Return the bytes of such bits, the first of them the lowest of the first byte."""
    return [int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8)]


def test_values_come_row_by_row_and_then_the_indices_of_each_run_of_rows() -> None:
    """Rows alike are worked on together, wherever they are. An oracle in Python's lists and strings of bits."""
    sent, kept, indices = normals(NUMEL), list[float](), list[int]()
    start = 0
    for rows in RUNS:
        bits = ""
        for _ in range(rows.number):
            row = sent[start : start + rows.length].tolist()
            start += rows.length
            chosen = sorted(sorted(range(rows.length), key=lambda place, row=row: -abs(row[place]))[: rows.kept])  # type: ignore[misc]
            kept += [row[place] for place in chosen]
            if rows.as_bitmap:
                bits += "".join("1" if place in chosen else "0" for place in range(rows.length))
            else:
                bits += "".join(f"{place:0{rows.width}b}"[::-1] for place in chosen)
        indices += as_bytes(bits) if rows.kept < rows.length else []
    payload = payload_of(Ragged().encode(sent))
    assert payload[: 4 * len(kept)].view(torch.float32).tolist() == kept
    assert payload[4 * len(kept) :].tolist() == indices


def test_what_was_kept_arrives_in_its_place_and_elsewhere_nothing() -> None:
    codec, sent = Ragged(), normals(NUMEL)
    arrived = codec.decode(codec.encode(sent), sent)
    assert torch.equal(arrived, codec.round_trip(sent))
    assert torch.equal(arrived[arrived != 0], sent[arrived != 0])
    assert int((arrived != 0).sum()) == sum(rows.number * rows.kept for rows in RUNS)
