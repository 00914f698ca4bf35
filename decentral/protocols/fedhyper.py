"""FedHyper: local SGD whose learning rate follows whether updates go on in the direction of the last ones."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.merge import cosine, length
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule

MOST_GROWTH = 1.1
"""A worker's own factor grows by so much a step at most."""
GLOBAL_SHARE = 0.1
"""What the last global update counts for in a worker's own factor, beside its last step."""


class FedHyper(AllReduceRule):
    """Every H local steps an average, and a hypergradient step on a learning rate's factor a, which is 1 at first.

        Delta_t = mean_i (anchor - theta_i);   a_t = clip(a_(t-1) + <Delta_t, Delta_(t-1)>, 1 / gamma, gamma)
        "outer":   anchor <- anchor - a_t Delta_t
        "inner":   anchor <- anchor - Delta_t;   all workers' local steps have learning rate a_t lr
        "own":     the same, but each worker has a factor of its own, 1 at the start of a phase, and after local step k
                   a <- clip(a min(1.1, 1 + <s_k, s_(k-1)> + 0.1 <s_k, -Delta_(t-1)> / n), 1 / gamma, gamma)

    FedHyper-G, -SL and -CL of Wang et al., arXiv 2310.03156, from their code and not the paper; n are the workers, s_k
    is the change by local step k, and k is 2 at first (where the code compares with the global update alone). A product
    <x, y> grows with the model and with the learning rate squared, so here it is the cosine unless `normalise` is
    false. The code's bounds are 0.2 and 5 for "outer" and a range of learning rates for "inner"; gamma is the paper's,
    from memory. There is no outer momentum: it would count the same agreement twice. With gamma = 1 it is local SGD.
    """

    name = "fedhyper"
    other_memory = "a factor of the learning rate"
    newcomers = "none"
    period: Schedule = Every(period=50)
    """Local steps between rounds (H)."""
    adapts: Literal["outer", "inner", "own"] = "outer"
    """Whose learning rate: that of the outer step, of all local steps alike, or of each worker's local steps."""
    limit: float | None = Field(default=None, ge=1)
    """Largest factor, and one over the smallest (gamma); unset: 3 for "outer", otherwise 10."""
    normalise: bool = True
    """Take the cosine for a product; false: the product itself, as the paper does."""

    def check_own_loop(self, *, norms: bool, endless: bool) -> None:
        super().check_own_loop(norms=norms, endless=endless)
        if self.adapts != "outer":
            raise ConfigError(
                f"rule.adapts: '{self.adapts}' sets inner learning rates, which are the loop's own; take 'outer'"
            )

    async def run(self, peer: Peer) -> None:
        lr = peer.inner.lr
        anchor, last = peer.slot("anchor", peer.params), peer.slot("last")
        factor = peer.slot("factor", torch.ones(1))
        if self.adapts == "inner":
            peer.set_learning_rate(lr * float(factor))
        while await self._phase(peer, self.period.steps(peer), lr, last):
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is None:
                continue
            if self.adapts != "own":
                factor.fill_(self._clipped(float(factor) + self._product(mean, last)))
            if self.adapts == "inner":
                peer.set_learning_rate(lr * float(factor))
            last.copy_(mean)
            peer.params.copy_(anchor.sub_(mean, alpha=float(factor) if self.adapts == "outer" else 1.0))

    async def _phase(self, peer: Peer, steps: int, lr: float, last: Tensor) -> int:
        """Do the local steps of a phase; return how many."""
        if self.adapts != "own":
            return await peer.train(steps)
        before, step, factor = peer.params.clone(), None, 1.0
        peer.set_learning_rate(lr)
        for done in range(steps):
            if not await peer.train(1):
                return done
            change = peer.params - before
            if step is not None:
                away = self._product(change, last) / len(peer.members)  # `last` points where parameters came from
                growth = 1 + self._product(change, step) - GLOBAL_SHARE * away
                factor = self._clipped(factor * min(MOST_GROWTH, growth))
                peer.set_learning_rate(lr * factor)
            before.copy_(peer.params)
            step = change
        return steps

    def _product(self, one: Tensor, other: Tensor) -> float:
        return cosine(one, other) * (1.0 if self.normalise else length(one) * length(other))

    def _clipped(self, factor: float) -> float:
        limit = self.limit or (3.0 if self.adapts == "outer" else 10.0)
        return min(max(factor, 1 / limit), limit)
