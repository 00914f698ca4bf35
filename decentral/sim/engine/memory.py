"""Memory that a process shares with those forked from it."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 26
"""Taken from the system at once: pages that nobody touches cost nothing, and mappings are few."""
ALIGNMENT_BYTES = 64
"""Vector instructions see in every tensor what they see in one of torch's own, so both give the same bits."""


class Arena:
    """Tensors in anonymous shared mappings: what a forked process writes, all see. Freed with the last tensor.

    Not torch's `share_memory_`, whose files in /dev/shm are limited to 64 MB in many containers.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a new tensor of zeros."""
        count = math.prod(shape)
        if not count:
            return torch.zeros(shape, dtype=dtype)
        nbytes = -(-count * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._block is None or self._used + nbytes > len(self._block):
            self._block, self._used = mmap.mmap(-1, max(nbytes, BLOCK_BYTES)), 0
        flat = torch.frombuffer(self._block, dtype=dtype, count=count, offset=self._used)
        self._used += nbytes
        return flat.view(shape)

    def copy_of(self, values: Tensor) -> Tensor:
        """Return a tensor equal to `values`."""
        return self.zeros(tuple(values.shape), values.dtype).copy_(values)
