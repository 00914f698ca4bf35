"""Gradient coding: each worker computes several workers' gradients, so that nobody waits for stragglers."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.coded_rounds import CodedRounds
from decentral.protocols.server import Server
from decentral.replica import BatchId


class GradientCoding(CodedRounds):
    """Worker i sends a sum of s + 1 workers' gradients, and any n - s of these give the mean gradient of all n.

        push_i = sum_j B_ij g_j;   a' B_I = (1, ..., 1) for the pushes I that came
        model <- outer(model, a' push_I / n)

    Tandon et al., arXiv 1612.03301. Groups of s + 1 workers compute the same gradients (fractional repetition). If
    s + 1 does not divide n, worker i of the last group, of up to 2 s + 1, computes g_i to g_(i + s), and there H B' = 0
    for a random H whose rows sum to zero. In the paper that group is then all workers, and the weights grow with it,
    and rounding errors with them. g_j is the gradient of the batch that worker j would train on. A round ends as soon
    as its pushes give the sum, and a late push is dropped. With more than s workers gone every round is skipped.
    """

    name = "gradient_coding"

    def first_assignment(self) -> int:
        return 1

    def next_assignment(self, server: Server, worker: int) -> int:
        return server.began + server.version + 1

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        """Compute this worker's coded gradient of job `assigned`."""
        if not peer.steps_left:
            return None
        coded = torch.zeros_like(peer.params)
        for worker, weight in zip(peer.cohort, self.code(peer)[peer.cohort.rank(peer.id)].tolist(), strict=True):
            if weight:
                await self.add_gradient(peer, coded, BatchId(worker, assigned - 1), weight)
        peer.miss(assigned - 1 - peer.step)
        await self.count_steps(peer, max(assigned, peer.step + 1))
        return coded
