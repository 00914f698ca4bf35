"""Vectors put together from parts of several workers' ones: of a checkpoint only what they need is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from decentral.checkpoint.archive import Found, read_chunks
from decentral.checkpoint.manifest import CHUNK, DTYPES, Held
from decentral.checkpoint.storage import Storage


class Span(NamedTuple):
    """Elements `start .. stop - 1` of a worker's tensor, which lie from `to` on in the vector that is put together."""

    worker: int
    start: int
    stop: int
    to: int


def load_spans(storage: Storage, found: Found, names: Collection[str], spans: Sequence[Span]) -> dict[str, Tensor]:
    """Return vectors made of these spans of the workers' tensors of these names, one for each name.

    Reads the chunks that the spans lie in and checks them; raises `RunError` if a byte has changed since the checkpoint
    was found.
    """
    held = {
        (worker, each.name): each
        for worker in found.manifest.workers
        for each in found.manifest.workers[worker].tensors
    }
    wanted = {digest for name in names for span in spans for digest in _chunks(held[span.worker, name], span)}
    chunks = read_chunks(storage, found, wanted)
    size, vectors = max(span.to + span.stop - span.start for span in spans), {}
    for name in names:
        vectors[name] = vector = torch.empty(size, dtype=DTYPES[held[spans[0].worker, name].dtype])
        for span in spans:
            source, numel = held[span.worker, name], span.stop - span.start
            data = bytearray().join(chunks[digest] for digest in _chunks(source, span))
            start = span.start * vector.element_size() % CHUNK
            vector[span.to : span.to + numel] = torch.frombuffer(data, dtype=vector.dtype, count=numel, offset=start)
    return vectors


def _chunks(held: Held, span: Span) -> tuple[str, ...]:
    """Return the digests of the chunks in which the span lies."""
    width = DTYPES[held.dtype].itemsize
    return held.chunks[span.start * width // CHUNK : -(-span.stop * width // CHUNK)]
