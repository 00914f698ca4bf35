"""FedKSeed: local zeroth-order steps along K directions that everybody knows; only K sums travel."""

from __future__ import annotations

import torch
from pydantic import Field

from decentral.errors import ConfigError
from decentral.inner import SGD
from decentral.peer import Peer
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.zeroth_order import direction, slope
from decentral.replica import seed_of


class FedKSeed(AllReduceRule):
    """Each local step goes along one of K directions; every H steps the model moves by the mean of what was gone.

        k at random;   p = (L_i(theta + eps z_k) - L_i(theta - eps z_k)) / (2 eps)
        theta <- theta - lr p z_k;   a_ik <- a_ik + lr p
        every H steps:   theta <- anchor - sum_k mean_i(a_ik) z_k;   anchor <- theta;   a <- 0

    Qin et al., arXiv 2312.06353, and its code, with equal weights and seeds drawn uniformly. There a worker sends its H
    (seed, slope) pairs and receives K sums; here K sums go both ways. The learning rate is part of the sums, so it may
    follow a schedule; the inner optimiser must be plain SGD, whose steps sums can repeat. A step costs 2 / 3 of a usual
    one and makes P random numbers, a round up to K P of them.
    """

    name = "fedkseed"
    needs_whole_model = "a worker looks at losses of the whole model"
    needs_task = "it asks for losses"
    newcomers = "none"
    rests = False
    period: Schedule = Every(period=200)
    """Local steps between rounds (H)."""
    seeds: int = Field(default=4096, ge=1)
    """Directions (K)."""
    epsilon: float = Field(default=5e-4, gt=0)
    """How far to both sides the loss is looked at (eps)."""

    def check(self, workers: int) -> None:
        super().check(workers)
        if self.codec.shaped:
            raise ConfigError(f"rule.codec: '{self.codec.spelling()}' is for weight matrices, and what travels is sums")

    async def run(self, peer: Peer) -> None:
        inner = peer.inner
        if not isinstance(inner, SGD) or inner.momentum or inner.weight_decay or inner.clip_norm:
            raise ConfigError(
                f"inner: '{self.name}' repeats local steps from sums, which plain SGD alone allows; set inner to 'sgd' "
                "without momentum, weight_decay and clip_norm"
            )
        anchor, sums = peer.slot("anchor", peer.params), torch.zeros(self.seeds)
        while peer.steps_left:
            for _ in range(min(self.period.steps(peer), peer.steps_left)):
                chosen = peer.rng(f"fedkseed {peer.id}", peer.step).randrange(self.seeds)
                steepness = await slope(peer, self._seed(peer, chosen), self.epsilon)
                sums[chosen] += peer.learning_rate(peer.step) * steepness
                peer.grads.copy_(direction(self._seed(peer, chosen), peer.grads)).mul_(steepness)
                await peer.apply_update()
            mean = await self.agreed_mean(peer, sums)
            if mean is not None:
                for chosen in mean.nonzero().view(-1).tolist():
                    anchor.sub_(direction(self._seed(peer, chosen), anchor), alpha=float(mean[chosen]))
                peer.params.copy_(anchor)
                sums.zero_()

    def _seed(self, peer: Peer, chosen: int) -> int:
        return seed_of(peer.seed, "fedkseed", chosen)
