"""Single merge: sparse gossip while training, one complete average at the very end."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from decentral.errors import ConfigError
from decentral.inner import Fraction
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import AllReduce, require_dense
from decentral.protocols.gossip import mix
from decentral.protocols.rounds import agreed_mean
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import EqualPeriod, Every
from decentral.protocols.topology import RandomGroups, require_two


class SingleMerge(SyncRule):
    """Every H local steps a fraction R of the random pairs average; after the last step all workers average once.

        round t: pair (i, j) averages with probability R;     at the end: theta_i <- (1 / m) sum_k theta_k

    "On the surprising effectiveness of a single global merging", arXiv 2507.06542 (R = 0.2, H = 100). The paper's code
    pulls from one peer, which does not keep the network's mean; here pairs exchange. After the merge at the end the
    running statistics of batch normalisation are estimated anew, each worker on its own batches, and averaged.
    """

    name = "single_merge"
    period: EqualPeriod = Every(period=100)
    """Local steps between rounds (H)."""
    rate: float = Field(default=0.2, ge=0, le=1)
    """Chance of a pair to average in a round (R)."""
    window: tuple[Fraction, Fraction] | None = None
    """Shares of the local steps between which every round averages over all workers, such as (0.5, 0.6)."""
    merge_at_end: bool = True
    """Average over all workers after the last step."""
    evaluate_merged: int = Field(default=0, ge=0)
    """Rounds between two looks at what a merge would give, which nobody adopts; 0: none. Each costs an all-reduce."""
    norm_batches: int = Field(default=32, ge=1)
    """Batches on which a worker estimates the statistics of batch normalisation, if the model has any."""
    codec: Codec = Float32()
    """How parameters travel in gossip; the merge itself is in float32."""
    all_reduce: AllReduce = "butterfly"
    """Who talks to whom in the merge; see `AllReduceRule`."""

    @model_validator(mode="after")
    def _window_in_order(self) -> SingleMerge:
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window {self.window} must begin before it ends")
        return self

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)

    def check_own_loop(self, *, norms: bool, endless: bool) -> None:
        super().check_own_loop(norms=norms, endless=endless)
        if self.evaluate_merged:
            raise ConfigError("rule.evaluate_merged: it takes held-out metrics, which no training loop offers; take 0")
        if norms and self.merge_at_end:
            raise ConfigError(
                "rule.merge_at_end: the merged model's batch normalisation is estimated on batches, which no training "
                "loop offers; take a model without it, or false"
            )
        if endless and self.window is not None:
            raise ConfigError("steps: missing; rule.window is a share of all local steps: say how many there are")

    async def run(self, peer: Peer) -> None:
        while await peer.train(self.period.steps(peer)):
            round_ = peer.next_round("pair")
            if not peer.steps_left and self.merge_at_end:
                continue  # nothing is worth mixing right before the merge
            if self.window is not None and self.window[0] < peer.step / peer.budget <= self.window[1]:
                await self._merge(peer)
            else:
                await self._gossip(peer, round_)
            if self.evaluate_merged and round_ % self.evaluate_merged == 0:
                await self._evaluate_merged(peer)
        if self.merge_at_end and await self._merge(peer):
            await self._estimate_statistics(peer)

    async def _gossip(self, peer: Peer, round_: int) -> None:
        links = RandomGroups().links(peer, round_)
        pair = min(peer.id, *links.to) if links.to else peer.id
        if peer.rng(f"single_merge {pair}", round_).random() < self.rate:
            await mix(peer, links, self.codec, round_)

    async def _merge(self, peer: Peer, channel: str = "sync") -> bool:
        """Set the parameters to the mean of all; return False, and leave them, if the round was skipped."""
        merged = await agreed_mean(peer, peer.params, Float32(), self.all_reduce, channel)
        if merged is not None:
            peer.params.copy_(merged)
        return merged is not None

    async def _evaluate_merged(self, peer: Peer) -> None:
        """Journal what the mean of all would be worth, and go on as if nothing had been."""
        own, statistics = peer.params.clone(), peer.statistics
        members = peer.members
        if await self._merge(peer, "counterfactual"):
            await self._estimate_statistics(peer)
            if peer.id == min(peer.members):
                await peer.evaluate(mean_of=members)
        peer.params.copy_(own)
        peer.statistics = statistics

    async def _estimate_statistics(self, peer: Peer) -> None:
        """Estimate the statistics at the merged parameters: those of all workers' batches together."""
        if not len(peer.statistics):
            return
        await peer.estimate_statistics(self.norm_batches)
        means, variances = peer.statistics.chunk(2)
        moments = torch.cat([means, variances + means.square()])
        mean = await agreed_mean(peer, moments, Float32(), self.all_reduce, "statistics")
        if mean is not None:
            peer.statistics = pooled(mean)


def pooled(moments: Tensor) -> Tensor:
    """Return (means, variances) of (means, mean squares), `[S]` each way."""
    means, squares = moments.chunk(2)
    return torch.cat([means, (squares - means.square()).clamp(min=0)])
