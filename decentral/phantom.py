"""`Phantom`: a vector that has a length and no elements, for simulations of time and traffic alone.

Rules and collectives do arithmetic on whatever the peer's buffers are. In timing-only mode these are phantoms, so the
same code runs in well under a microsecond an operation, and every packet still has its true size.
"""

from __future__ import annotations

from typing import Any

from decentral.errors import ConfigError

_ELEMENTWISE = """
    add add_ sub sub_ mul mul_ div div_ neg neg_ abs sign lerp lerp_ copy_ clone detach zero_ fill_ to float
    contiguous addcmul_ addcdiv_ clamp clamp_ sqrt sqrt_ square cpu zeros_like empty_like ones_like
"""
_SAME_LENGTH = frozenset(_ELEMENTWISE.split())


class Phantom:
    """A `[size]` float32 vector without elements: elementwise operations and slices work, reading values is refused."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def numel(self) -> int:
        return self.size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: slice) -> Phantom:
        start, stop, step = index.indices(self.size)
        return Phantom(len(range(start, stop, step)))

    def __setitem__(self, index: slice, value: object) -> None:
        """Writing changes nothing: there is nothing to change."""

    def _same(self, *_args: object, **_kwargs: object) -> Phantom:
        return self

    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = _same
    __mul__ = __rmul__ = __imul__ = __truediv__ = __itruediv__ = __neg__ = _same

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"a timing-only simulation has no tensor values, and this rule or codec needs them (it asked for "
            f"'{name}'); run it without --timing-only"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if name == "cat":
            return Phantom(sum(len(part) for part in args[0]))
        first = args[0]
        if name in _SAME_LENGTH and isinstance(first, Phantom):
            return first
        return getattr(Phantom(0), name)


for _name in _SAME_LENGTH:
    setattr(Phantom, _name, Phantom._same)
