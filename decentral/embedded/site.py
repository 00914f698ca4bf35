"""A site: the processes that share one replica. One of them talks with the other sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Site:
    """This process alone, or the ranks of a process group, whose first rank `speaks` for all of them."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.size, self.speaks = 1, True
        if group is not None:
            import torch.distributed as dist

            self.size, self.speaks = dist.get_world_size(group), dist.get_rank(group) == 0
            self._source = dist.get_global_rank(group, 0)
            self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def same(self, numbers: Sequence[int]) -> list[int]:
        """Return the first rank's numbers. All ranks call it, with equally many."""
        if self.size == 1:
            return list(numbers)
        told: list[int] = self.spread(torch.tensor(numbers, dtype=torch.int64, device=self._device)).tolist()
        return told

    def spread(self, values: Tensor) -> Tensor:
        """Overwrite `values` by those of the first rank, on all ranks; return them."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(values, self._source, group=self._group)
        return values
