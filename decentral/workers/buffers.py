"""Memory for what comes in, used again and again: a round of training takes as much as the one before.

Fresh memory is dear: the kernel has to clear every page of it, and doing so costs more than filling it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRAIN = 1 << 16
"""Buffers are of multiples of so many bytes: the chunks of a vector that differ by an element fit the same ones."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_HELD_BYTES, _MAPPED_BYTES = 64 << 20, 4 << 20


def prepare_memory() -> bool:
    """Make fresh memory cheaper for this process; return False where the C library cannot be told.

    torch takes large tensors in pages of 2 MB, if it has not taken one before: a third of the time. And glibc keeps up
    to 64 MiB of freed memory: every chunk on the wire passes through several short-lived buffers of its size inside
    gRPC, and the larger ones would be fetched from the kernel each time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, _MAPPED_BYTES), (_M_TRIM_THRESHOLD, _HELD_BYTES), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) for name, value in settings)


class _Loan(np.ndarray[Any, np.dtype[np.uint8]]):
    """The array behind a lent tensor: an ndarray that can be referred to weakly."""


class Buffers:
    """Lends uint8 tensors; their memory comes back by itself when the last tensor over it dies.

    At most `kept_bytes` wait here to be lent again; what was unused the longest goes first. Tensors may die in any
    thread, but only one thread may borrow.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._returned: deque[NDArray[np.uint8]] = deque()  # appending is atomic: loans end in whatever thread
        self._free: list[NDArray[np.uint8]] = []
        self._free_bytes = 0

    def lend(self, nbytes: int) -> Tensor:
        """Return `[nbytes]` uint8 on the CPU with any contents."""
        if nbytes < GRAIN:
            return torch.empty(nbytes, dtype=torch.uint8)
        self._sort_in()
        size = -(-nbytes // GRAIN) * GRAIN
        memory = self._found(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        loan = memory[:nbytes].view(_Loan)
        weakref.finalize(loan, self._returned.append, memory).atexit = False
        return torch.from_numpy(loan)

    def _found(self, size: int) -> NDArray[np.uint8] | None:
        for index in reversed(range(len(self._free))):
            if self._free[index].nbytes == size:
                self._free_bytes -= size
                return self._free.pop(index)
        return None

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._free.append(memory)
            self._free_bytes += memory.nbytes
        while self._free_bytes > self._kept_bytes:
            self._free_bytes -= self._free.pop(0).nbytes

    @property
    def free_bytes(self) -> int:
        """Bytes that wait to be lent again."""
        self._sort_in()
        return self._free_bytes
