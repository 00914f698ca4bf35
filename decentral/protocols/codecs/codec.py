"""`Codec`: how a tensor travels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from decentral.naming import Kind
from decentral.wire import FrameError, Packet

if TYPE_CHECKING:
    from decentral.protocols.codecs.coder import Coder, SlotMaker

Loss = Literal["none", "rounding", "contractive", "unbiased"]
"""What a codec does to a vector x, C(x) being what arrives.

"none": C(x) = x. "rounding": every element arrives, a little off. "contractive": ||C(x) - x||^2 <= (1 - a) ||x||^2 for
some 0 < a < 1; much is missing, and error feedback can make up for it. "unbiased": E C(x) = x, with a large variance.
"""


class Codec(Kind):
    """Turns a float tensor of any shape into a packet of bytes and back, by way of a flat `[n]` float32 vector.

    Encoding copies: the packet never shares storage with the tensor. `decode(encode(x))` is the same bits everywhere,
    so replicas that decode the same packet stay equal. A subclass says `wire_bytes`, `pack` and `unpack`, and what it
    can do: impossible combinations are refused when a run file is read.
    """

    called = "codec"
    built_in: ClassVar[dict[str, type[Codec]]] = {}

    loss: ClassVar[Loss] = "rounding"
    linear: ClassVar[bool] = False
    """Whether encodings of several workers can be summed before they are decoded."""
    phases: ClassVar[int] = 1
    """Exchanges that one mean over the workers takes."""
    same_participants: ClassVar[bool] = False
    """Whether what it remembers holds for one set of workers only."""

    @property
    def grain(self) -> int:
        """Elements that are coded together: a cut at a multiple of it changes no element. 0: the vector is not cut."""
        return 1

    @property
    def shaped(self) -> bool:
        """Whether it looks at rows and columns, and so wants to be `fit`."""
        return False

    @abstractmethod
    def wire_bytes(self, numel: int) -> int:
        """Return the payload's size in bytes for a vector of `numel` elements."""

    @abstractmethod
    def pack(self, values: Tensor, payload: Tensor) -> None:
        """Write the encoded `values` `[n]` float32, contiguous, into `payload` `[wire_bytes(n)]` uint8, same device."""

    @abstractmethod
    def unpack(self, payload: Tensor, values: Tensor) -> None:
        """Write what `payload` stands for into `values` `[n]` float32, contiguous.

        The payload has the right length and is otherwise not to be trusted: raises `FrameError` for what `pack` never
        writes and would lead astray (a negative scale, an index out of range or twice).
        """

    def fit(self, shapes: Sequence[tuple[int, ...]]) -> Codec:
        """Return the codec for vectors that are tensors of these shapes, flattened one after the other."""
        return self

    def coder(self, slot: SlotMaker) -> Coder | None:
        """Return what makes means with this codec and remembers what must be remembered; None: nothing special."""
        return None

    def encode(self, values: Tensor) -> Packet:
        """Return the packet for `values`, a tensor of any shape and float dtype."""
        numel = values.numel()
        nbytes = self.wire_bytes(numel)
        if not isinstance(values, Tensor):  # a phantom: sizes alone
            return Packet(self.spelling(), numel, nbytes, None)
        payload = torch.empty(nbytes, dtype=torch.uint8, device=values.device)
        self.pack(values.detach().to(torch.float32).reshape(-1), payload)
        return Packet(self.spelling(), numel, nbytes, payload.cpu())

    def lend(self, values: Tensor) -> Packet:
        """Return what `encode` does, perhaps in the storage of `values`: do not change them while it is on its way."""
        return self.encode(values)

    def decode(self, packet: Packet, like: Tensor) -> Tensor:
        """Return what the packet stands for as float32, in the shape and on the device of `like`.

        Raises `FrameError` if the packet is of another codec or length than `like` calls for, or is not finite.
        """
        self._require_fitting(packet, like)
        return self._open(packet, like, None)

    def read(self, packet: Packet, like: Tensor, into: Tensor | None = None) -> Tensor:
        """Return what `decode` does, perhaps in memory that others read too: do not change it.

        It is the packet's own, or was made for who read the packet before. With `into` `[n]` float32, contiguous, it is
        written there instead.
        """
        self._require_fitting(packet, like)
        if packet.payload is None or (into is not None and not packet.read):
            packet.read = True
            return self._open(packet, like, into)
        if packet.decoded is None:  # simulated workers hear the same packet, and would all come to the same
            packet.decoded = self._open(packet, like, None)
        return packet.decoded.view(like.shape) if into is None else into.copy_(packet.decoded).view(like.shape)

    def _require_fitting(self, packet: Packet, like: Tensor) -> None:
        numel = like.numel()
        if packet.codec != self.spelling():
            raise FrameError("codec", f"expected a packet of codec '{self.spelling()}', got one of {packet.codec!r}")
        if (packet.numel, packet.nbytes) != (numel, self.wire_bytes(numel)):
            raise FrameError(
                "length",
                f"expected {numel} elements in {self.wire_bytes(numel)} bytes of codec '{self.spelling()}', "
                f"got {packet.numel} in {packet.nbytes}",
            )

    def _open(self, packet: Packet, like: Tensor, into: Tensor | None) -> Tensor:
        numel = like.numel()
        if not isinstance(like, Tensor):  # a phantom: there is nothing to decode into
            return like
        if packet.payload is None or packet.payload.numel() != packet.nbytes:
            raise FrameError(
                "length", f"a packet of codec '{packet.codec}' says {packet.nbytes} bytes and brings another number"
            )
        values = self.opened(packet.payload.to(like.device), numel, into)
        self.require_finite(values)
        return values.view(like.shape)

    def require_finite(self, values: Tensor) -> None:
        """Raise `FrameError` if there is NaN or infinity among what a packet has decoded to."""
        if values.numel():
            low, high = torch.aminmax(values)  # one pass without temporaries; NaN is contagious
            if not (isfinite(low.item()) and isfinite(high.item())):
                raise FrameError("not_finite", f"a packet of codec '{self.spelling()}' decodes to NaN or infinity")

    def opened(self, payload: Tensor, numel: int, into: Tensor | None) -> Tensor:
        """Return what a payload of the right length stands for, `[numel]` float32, in `into` if there is one.

        Otherwise it may be a view of the payload.
        """
        values = torch.empty(numel, dtype=torch.float32, device=payload.device) if into is None else into
        if numel:
            self.unpack(payload, values)
        return values

    def round_trip(self, values: Tensor) -> Tensor:
        """Return exactly what a receiver of `encode(values)` will decode."""
        return self.decode(self.encode(values), values)


CODECS = Codec.built_in
"""The built-in codecs by name; the package fills it."""


class Wrapper(Codec):
    """A codec around another one, which does the packing."""

    codec: Codec
    """The codec inside."""

    @property
    def grain(self) -> int:
        return self.codec.grain

    @property
    def shaped(self) -> bool:
        return self.codec.shaped

    def wire_bytes(self, numel: int) -> int:
        return self.codec.wire_bytes(numel)

    def pack(self, values: Tensor, payload: Tensor) -> None:
        self.codec.pack(values, payload)

    def unpack(self, payload: Tensor, values: Tensor) -> None:
        self.codec.unpack(payload, values)

    def encode(self, values: Tensor) -> Packet:
        return self.codec.encode(values)

    def lend(self, values: Tensor) -> Packet:
        return self.codec.lend(values)

    def decode(self, packet: Packet, like: Tensor) -> Tensor:
        return self.codec.decode(packet, like)

    def read(self, packet: Packet, like: Tensor, into: Tensor | None = None) -> Tensor:
        return self.codec.read(packet, like, into)

    def fit(self, shapes: Sequence[tuple[int, ...]]) -> Codec:
        return self.model_copy(update={"codec": self.codec.fit(shapes)})
