"""Snapshots as bytes: described chunk by chunk, written as safetensors files, put together again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from decentral.checkpoint.manifest import CHUNK, DTYPES, Description, File, Held, Piece
from decentral.checkpoint.storage import StorageError
from decentral.snapshot import Snapshot

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def digest_of(data: bytes | memoryview) -> str:
    """Return the XXH3 digest of 128 bits, in hexadecimal.

    It tells chunks apart and finds what is torn, at the speed of memory; it is no defence against who wants to deceive.
    """
    return xxhash.xxh3_128_hexdigest(data)


def describe(worker: int, snapshot: Snapshot) -> Description:
    """Return what a whole snapshot of the worker holds. Reads every byte: call it in a thread.

    Raises `StorageError` for a tensor of a type that checkpoints do not know.
    """
    assert snapshot.life is not None
    for name, values in snapshot.tensors.items():
        if values.dtype not in _NAMES:
            raise StorageError(f"'{name}' is of type {values.dtype}, and checkpoints know {', '.join(DTYPES)}")
    tensors = tuple(
        Held(
            name=name,
            dtype=_NAMES[values.dtype],
            shape=tuple(values.shape),
            chunks=tuple(digest_of(chunk) for chunk in chunks_of(values)),
        )
        for name, values in snapshot.tensors.items()
    )
    return Description(
        worker=worker,
        step=snapshot.step,
        rounds=dict(snapshot.rounds),
        life=snapshot.life,
        tensors=tensors,
    )


def chunks_of(values: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous CPU tensor, `CHUNK` by `CHUNK`, without a copy."""
    data = values.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def pieces_of(snapshot: Snapshot, description: Description, digests: Sequence[str]) -> list[memoryview]:
    """Return the bytes of these chunks of a snapshot, in the order of `digests`; `KeyError` if one is missing."""
    wanted = set(digests)
    found: dict[str, memoryview] = {}
    for held in description.tensors:
        if wanted.isdisjoint(held.chunks):
            continue
        for digest, chunk in zip(held.chunks, chunks_of(snapshot.tensors[held.name]), strict=True):
            found.setdefault(digest, chunk)
    return [found[digest] for digest in digests]


def file_of(name: str, digests: Sequence[str], chunks: Sequence[memoryview]) -> tuple[File, bytes]:
    """Return what a safetensors file of these chunks, as bytes under their digests, is like; and its header."""
    entries: dict[str, dict[str, object]] = {}
    starts: list[int] = []
    end = 0
    for digest, chunk in zip(digests, chunks, strict=True):
        starts.append(end)
        end += len(chunk)
        entries[digest] = {"dtype": "U8", "shape": [len(chunk)], "data_offsets": [starts[-1], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    pieces = tuple(
        Piece(digest=digest, nbytes=len(chunk), start=len(header) + start)
        for digest, chunk, start in zip(digests, chunks, starts, strict=True)
    )
    return File(name=name, nbytes=len(header) + end, header=digest_of(header), pieces=pieces), header


def snapshot_of(description: Description, chunks: Mapping[str, bytes]) -> Snapshot:
    """Return the snapshot that was described, from its chunks by digest."""
    tensors: dict[str, Tensor] = {}
    for held in description.tensors:
        data = bytearray().join(chunks[digest] for digest in held.chunks)
        values = torch.frombuffer(data, dtype=DTYPES[held.dtype]) if data else torch.empty(0, dtype=DTYPES[held.dtype])
        tensors[held.name] = values.view(held.shape)
    return Snapshot(description.step, description.rounds, tensors, description.life)
