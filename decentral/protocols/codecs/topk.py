"""Top-k: the largest elements of each chunk and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator
from typing_extensions import Self

from decentral.protocols.codecs.bits import MAX_WIDTH
from decentral.protocols.codecs.codec import Codec
from decentral.protocols.codecs.sign_magnitude import SignMagnitude
from decentral.protocols.codecs.sparse import Rows, Sparse


class TopK(Sparse):
    """Keeps the k largest |x| of each chunk: ||C(x)||^2 + ||x - C(x)||^2 = ||x||^2 with exact values.

    The error is at most (1 - k / chunk) ||x||^2, so every layer is heard in every round; the short last chunk keeps as
    many, or all it has. With the defaults 64 of 4096 travel in 14 bits each, 146 times less than float32; wants error
    feedback. Chunks, packed indices and two-bit values as in SparseLoCo (arXiv 2508.15706).
    """

    name = "topk"
    k: int = Field(default=64, ge=1)
    """Elements of a chunk that travel."""
    chunk: int = Field(default=4096, ge=1, le=1 << MAX_WIDTH)
    """Elements among which the largest are chosen."""
    values: Codec = SignMagnitude()
    """How the values of what is kept travel."""

    @model_validator(mode="after")
    def _fewer_than_all(self) -> Self:
        if self.k > self.chunk:
            raise ValueError(f"k = {self.k} elements cannot be chosen among a chunk of {self.chunk}")
        return self

    @property
    def grain(self) -> int:
        return self._grain_of_rows(Rows(1, self.chunk, self.k))

    def rows(self, numel: int) -> Sequence[Rows]:
        whole, rest = divmod(numel, self.chunk)
        rows = [Rows(whole, self.chunk, self.k)] if whole else []
        return [*rows, Rows(1, rest, min(self.k, rest))] if rest else rows
