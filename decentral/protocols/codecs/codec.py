"""`Codec`: how a vector travels."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from decentral.part import Part
from decentral.wire import FrameError, Packet


class Codec(Part):
    """Turns a `[n]` float32 vector into a packet of bytes and back.

    Encoding copies: the packet never shares storage with the vector. `decode(encode(x))` is the same bits everywhere,
    so replicas that decode the same packet stay equal. A subclass says `wire_bytes`, `pack` and `unpack`.
    """

    @abstractmethod
    def wire_bytes(self, numel: int) -> int:
        """Return the payload's size in bytes for a vector of `numel` elements."""

    @abstractmethod
    def pack(self, values: Tensor, payload: Tensor) -> None:
        """Write the encoded `values` `[n]` float32 into `payload` `[wire_bytes(n)]` uint8, on the same device."""

    @abstractmethod
    def unpack(self, payload: Tensor, values: Tensor) -> None:
        """Write what `payload` stands for into `values` `[n]` float32."""

    def encode(self, values: Tensor) -> Packet:
        """Return the packet for `values` `[n]` float32."""
        numel = values.numel()
        nbytes = self.wire_bytes(numel)
        if not isinstance(values, Tensor):  # a phantom: sizes alone
            return Packet(self.spelling(), numel, nbytes, None)
        payload = torch.empty(nbytes, dtype=torch.uint8, device=values.device)
        self.pack(values.detach(), payload)
        return Packet(self.spelling(), numel, nbytes, payload.cpu())

    def decode(self, packet: Packet, like: Tensor) -> Tensor:
        """Return the `[n]` float32 vector of the packet, on the device of `like` `[n]`.

        Raises `FrameError` if the packet is of another codec or length than `like` calls for, or is not finite.
        """
        numel = like.numel()
        if (packet.codec, packet.numel, packet.nbytes) != (self.spelling(), numel, self.wire_bytes(numel)):
            raise FrameError(
                f"expected {numel} elements in {self.wire_bytes(numel)} bytes of codec '{self.spelling()}', "
                f"got {packet.numel} in {packet.nbytes} of '{packet.codec}'"
            )
        if not isinstance(like, Tensor):  # a phantom: there is nothing to decode into
            return like
        if packet.payload is None or packet.payload.numel() != packet.nbytes:
            raise FrameError(f"a packet of codec '{packet.codec}' says {packet.nbytes} bytes and brings another number")
        values = torch.empty(numel, dtype=torch.float32, device=like.device)
        self.unpack(packet.payload.to(like.device), values)
        if not bool(torch.isfinite(values).all()):
            raise FrameError(f"a packet of codec '{self.spelling()}' decodes to NaN or infinity")
        return values

    def round_trip(self, values: Tensor) -> Tensor:
        """Return exactly what a receiver of `encode(values)` will decode."""
        return self.decode(self.encode(values), values)
