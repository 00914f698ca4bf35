"""What workers, the desk and a checkpoint's reader tell each other: plain values that JSON and msgpack carry.

All are checked when they are read, for they come from the network or from storage: `Description.model_validate(fields)`
undoes `description.model_dump()`. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from decentral.snapshot import Life

FORMAT = 2
"""Version of the layout; a reader refuses any other."""
CHUNK = 1 << 22
"""Bytes that are hashed, shared out and read as one."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""XXH3 of 128 bits, in hexadecimal."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of tensors, by the names that safetensors has for them."""


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Held(_Told):
    """A tensor of a worker's: its name, type and shape, and the digest of each `CHUNK` of its bytes, in order."""

    name: str
    dtype: str
    shape: tuple[NonNegativeInt, ...]
    chunks: tuple[Digest, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yield the digest and the size in bytes of each chunk."""
        for index, digest in enumerate(self.chunks):
            yield digest, min(CHUNK, self.nbytes - index * CHUNK)

    @model_validator(mode="after")
    def _whole(self) -> Held:
        if self.dtype not in DTYPES:
            raise ValueError(f"'{self.name}' is of type {self.dtype}; known: {', '.join(DTYPES)}")
        if len(self.chunks) != -(-self.nbytes // CHUNK):
            raise ValueError(f"'{self.name}' has {self.nbytes} bytes and {len(self.chunks)} chunks of {CHUNK}")
        return self


class Description(_Told):
    """A worker's snapshot without its bytes: where it stands, its life (see `snapshot.Life`) and its tensors."""

    worker: NonNegativeInt
    step: NonNegativeInt
    rounds: dict[str, NonNegativeInt]
    life: Life
    tensors: tuple[Held, ...]


class Piece(_Told):
    """A chunk that lies in a file: its digest, its size, and its first byte."""

    digest: Digest
    nbytes: NonNegativeInt
    start: NonNegativeInt


class File(_Told):
    """A file of a checkpoint: its name, size, and the digest of what comes before its first piece; then the pieces."""

    name: Annotated[str, Field(pattern=r"^worker-\d+\.safetensors$")]
    nbytes: NonNegativeInt
    header: Digest
    pieces: tuple[Piece, ...]

    @model_validator(mode="after")
    def _whole(self) -> File:
        place = self.pieces[0].start if self.pieces else self.nbytes
        for piece in self.pieces:
            if piece.start != place:
                raise ValueError(f"{self.name}: a piece begins at byte {piece.start} where {place} is expected")
            place += piece.nbytes
        if place != self.nbytes:
            raise ValueError(f"{self.name}: its pieces end at byte {place} and it has {self.nbytes}")
        return self


class Manifest(_Told):
    """What makes a checkpoint of some files. It is written last: without it there is no checkpoint.

    `owner` is the run that wrote it, `run` its run file. `journal` says how many of each worker's records come before
    it; `extra` is whatever else the run wants to know when it goes on.
    """

    format: int = FORMAT
    number: NonNegativeInt
    owner: str
    decentral: str
    torch: str
    run: dict[str, Any]
    journal: dict[int, NonNegativeInt]
    extra: dict[str, Any]
    workers: dict[int, Description]
    files: tuple[File, ...]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not the one of this version, {FORMAT}")
        written = {piece.digest: piece.nbytes for file in self.files for piece in file.pieces}
        for worker, description in self.workers.items():
            for held in description.tensors:
                for digest, nbytes in held.sizes():
                    if written.get(digest) != nbytes:
                        raise ValueError(f"worker {worker}: a chunk of '{held.name}' is in no file")
        return self

    @property
    def step(self) -> int:
        """Local steps that the worker which is ahead had done."""
        return max((each.step for each in self.workers.values()), default=0)
