"""Data-parallel training: the baseline every other rule is compared with."""

from __future__ import annotations

from decentral.peer import Peer
from decentral.protocols.fragments import Buckets, Cut, Whole, require_partition
from decentral.protocols.reductions import Reductions
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every
from decentral.state import Layout


class DDP(AllReduceRule):
    """Synchronous data parallelism: every step applies the mean gradient of all workers.

        g_i = grad f(theta; batch_i);   theta <- inner_optimiser(theta, mean_i g_i)

    A bucket's reduction starts as soon as its gradient is ready, as in PyTorch's DistributedDataParallel (Li et al.,
    arXiv 2006.15704). If a round is skipped, its step goes by without a gradient for everybody: replicas stay equal.
    """

    name = "ddp"
    needs_task = "it asks for gradients, and applies them itself"
    common_steps = True
    buckets: Cut = Buckets()
    """Pieces in which gradients are reduced while the rest of the backward pass still runs."""

    @property
    def pieces(self) -> bool:
        return not isinstance(self.buckets, Whole)

    def check_layout(self, layout: Layout) -> None:
        require_partition(self.buckets.split(layout), layout)

    def reductions(self) -> Reductions:
        return Reductions(Every(period=1), self.codec, self.all_reduce, pieces=self.buckets)

    async def run(self, peer: Peer) -> None:
        buckets = self.buckets.split(peer.layout)
        while peer.steps_left:
            reduction = self.begin(peer, fragments=buckets, cumulative=False)
            async for index in peer.backward([bucket.spans for bucket in buckets]):
                reduction.contribute(buckets[index].read(peer.grads), index)
            means = await reduction.settle()
            if means is None:
                peer.grads.zero_()
            else:
                for bucket, mean in zip(buckets, means, strict=True):
                    bucket.write(peer.grads, mean)
            await peer.apply_update()
