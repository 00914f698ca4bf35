"""SparseLoCo: DiLoCo with a few large elements of each outer gradient and a residual instead of an outer momentum."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from decentral.protocols.codecs import Codec, ErrorFeedback, TopK
from decentral.protocols.collectives import AllReduce
from decentral.protocols.diloco import DiLoCo
from decentral.protocols.merge import MERGES, Merge, length, mean
from decentral.protocols.outer import Outer, OuterSGD
from decentral.protocols.schedule import Every, Schedule


class SparseMean(Merge):
    """The mean of sparse contributions, each scaled down to the median norm if it is longer.

        x_i <- x_i min(1, median_j |x_j| / |x_i|);   merged = sum_i x_i / n

    Clipping as in the code of SparseLoCo's live runs, there for each tensor, here for the whole vector; no worker pulls
    further than a usual one, whatever it sends. The paper (arXiv 2508.15706) divides by the workers; the code divides
    each coordinate by the workers that sent it, up to n times more. The median of an even number is the lower one.
    """

    name = "sparse_mean"
    whole: ClassVar[bool] = True
    clip: bool = True
    """Scale long contributions down to the median norm."""
    normalise: Literal["workers", "contributors"] = "workers"
    """What a coordinate's sum is divided by: all workers, or those whose value there is not zero."""

    def merge(self, contributions: Sequence[Tensor], center: Tensor | None) -> Tensor:
        if self.clip:
            contributions = _clipped_to_median(contributions)
        merged = mean(contributions)
        if self.normalise == "contributors":
            senders = torch.zeros_like(merged)
            for contribution in contributions:
                senders.add_(contribution != 0)
            merged.mul_(len(contributions)).div_(senders.clamp_(min=1))
        return merged


def _clipped_to_median(contributions: Sequence[Tensor]) -> list[Tensor]:
    norms = [length(each) for each in contributions]
    median = statistics.median_low(norms)
    return [each * (median / norm) if norm > median else each for each, norm in zip(contributions, norms, strict=True)]


MERGES[SparseMean.name] = SparseMean


class SparseLoCo(DiLoCo):
    """DiLoCo that sends the largest elements of what it has not sent yet, and steps by plain outer SGD.

        e_i <- beta e_i + Delta_i;   send C(e_i);   e_i <- e_i - C(e_i);   anchor <- anchor - eta merge_i C(e_i)

    Sarfi et al., arXiv 2508.15706, with the settings of the live run: beta 0.95, 64 of 4096 elements in two bits each,
    H = 30, eta 1. The decayed residual stands in for the outer momentum. The public codes scale Delta by eta as well,
    so a configured eta acts there as its square; here it acts once. Chunks are stretches of the flat vector, there
    blocks of 64 x 64 of a matrix. It is DiLoCo with other parts: with every element kept, beta 0 and merge "mean" it is
    DiLoCo with outer SGD.
    """

    name = "sparse_loco"
    period: Schedule = Every(period=30)
    outer: Outer = OuterSGD()
    codec: Codec = ErrorFeedback(codec=TopK(), decay=0.95)
    all_reduce: AllReduce = "gather"
    merge: Merge = SparseMean()
