"""Workers that make means together in one process: `Reduce` over a shared board, as a gathering all-reduce does it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from decentral.errors import PeerGone
from decentral.members import Members
from decentral.protocols.codecs import Codec, Coder
from decentral.protocols.merge import mean
from decentral.wire import FrameError, Packet


class Board:
    """One attempt at a mean: what each member put up in each call. Members find call number `fails_at` failing."""

    def __init__(self, members: Members, seed: int, fails_at: int | None) -> None:
        self.members, self.seed, self.fails_at = members, seed, fails_at
        self.packets: list[dict[int, Packet]] = []
        self.means: list[asyncio.Future[Tensor]] = []


class Seat:
    """A member's `Reduce`. What it puts up is encoded, what it takes is decoded and summed in ascending order."""

    def __init__(self, board: Board, worker: int) -> None:
        self._board, self._worker = board, worker
        self._calls = 0

    @property
    def members(self) -> Members:
        return self._board.members

    @property
    def seed(self) -> int:
        return self._board.seed

    async def __call__(self, values: Tensor, codec: Codec) -> Tensor:
        board, call = self._board, self._calls
        self._calls += 1
        if call == board.fails_at:
            raise PeerGone("somebody is gone")
        if call == len(board.packets):
            board.packets.append({})
            board.means.append(asyncio.get_running_loop().create_future())
        packets = board.packets[call]
        packets[self._worker] = codec.encode(values)
        if len(packets) == len(board.members):
            try:
                decoded = [codec.decode(packets[member], values) for member in board.members]
            except FrameError as error:
                board.means[call].set_exception(error)
            else:
                board.means[call].set_result(mean(decoded))
        return (await board.means[call]).clone()


def means(
    coders: Sequence[Coder],
    vectors: Sequence[Tensor],
    *,
    ids: tuple[int, ...] | None = None,
    seed: int = 0,
    fails_at: int | None = None,
) -> tuple[list[Tensor], list[dict[int, Packet]]]:
    """Return what each coder's `mean` came to, and the packets of each call. Raises `PeerGone` if it `fails_at` one."""

    async def attempt() -> tuple[list[Tensor], list[dict[int, Packet]]]:
        board = Board(Members(0, ids or tuple(range(len(coders)))), seed, fails_at)
        seats = [Seat(board, worker) for worker in board.members]
        tasks = [coder.mean(values, seat) for coder, values, seat in zip(coders, vectors, seats, strict=True)]
        got = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [each for each in got if isinstance(each, BaseException)]
        if failed:
            raise failed[0]
        return [each for each in got if not isinstance(each, BaseException)], board.packets

    with contextlib.closing(asyncio.new_event_loop()) as loop:  # asyncio.run formats the task and its tensors
        return loop.run_until_complete(attempt())


class Slots(dict[str, Tensor]):
    """A worker's slots: `slots(name, like)` makes or finds one."""

    def __call__(self, name: str, like: Tensor) -> Tensor:
        if name not in self:
            self[name] = like.clone()
        return self[name]


def coders_of(codec: Codec, count: int) -> tuple[list[Coder], list[Slots]]:
    """Return the coders of so many workers and their slots."""
    slots = [Slots() for _ in range(count)]
    made = [codec.coder(each) for each in slots]
    return [coder for coder in made if coder is not None], slots


def normals(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def payload_of(packet: Packet) -> Tensor:
    assert packet.payload is not None
    return packet.payload


def all_same(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)
