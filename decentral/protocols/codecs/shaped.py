"""`Shaped`: codecs that look at rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import PrivateAttr
from typing_extensions import Self

from decentral.protocols.codecs.codec import Codec

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of tensors that lie one after the other in a vector."""


class Shaped(Codec):
    """A codec that sees a vector as the tensors it was `fit` to; without that, as one tensor of one dimension."""

    _shapes: Shapes | None = PrivateAttr(default=None)

    @property
    def grain(self) -> int:
        return 0

    @property
    def shaped(self) -> bool:
        return True

    def fit(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        fitted = self.model_copy()
        fitted._shapes = tuple(tuple(shape) for shape in shapes)
        return fitted

    def shapes(self, numel: int) -> Shapes:
        """Return the shapes of the tensors in a vector of `numel` elements."""
        return ((numel,),) if self._shapes is None else self._shapes
