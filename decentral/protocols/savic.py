"""SAVIC: local SGD in one metric, which all workers share and which changes at rounds only."""

from __future__ import annotations

import torch
from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class SAVIC(AllReduceRule):
    """Every H local steps the parameters are averaged, and so are the gradients that scale the steps until the next.

        theta_i <- inner_optimiser(theta_i, g_i / D)              H times, with the same D everywhere
        V <- beta_t V + (1 - beta_t) (mean_i g_i)^2;              D = max(alpha, sqrt(V))
        beta_t = (beta - beta^t) / (1 - beta^t)

    Chezhegov et al., arXiv 2406.00846, from memory of the paper, with Adam's beta_t, t counting the rounds from 1, and
    global scaling: g_i is a worker's gradient at the last step of its phase. The paper's linear rule with Hessian
    diagonals (OASIS) is not here. D is 1 until the first round. Unlike Local Adam's, this metric never differs between
    workers. The inner optimiser should be SGD: gradients are scaled before it sees them.
    """

    name = "savic"
    other_memory = "whether they know a scale yet"
    needs_task = "it asks for gradients, and applies them itself"
    newcomers = "none"
    period: Schedule = Every(period=20)
    """Local steps between rounds (H)."""
    beta: float = Field(default=0.99, ge=0, lt=1)
    """Memory of the scaling, in rounds."""
    alpha: float = Field(default=0.01, gt=0)
    """Least scaling, a size of gradients: no coordinate steps by more than lr g / alpha between two rounds."""

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        square, known = peer.slot("square"), peer.slot("known", torch.zeros(1))
        scale = peer.slot("scale", torch.ones_like(peer.params))
        gradient = peer.slot("gradient")
        while peer.steps_left:
            for left in reversed(range(min(self.period.steps(peer), peer.steps_left))):
                async for _ in peer.backward([((0, peer.layout.size),)]):
                    pass
                if not left:
                    gradient.copy_(peer.grads)
                peer.grads.div_(scale)
                await peer.apply_update()
            round_ = self.begin(peer)
            round_.contribute(anchor - peer.params)
            round_.contribute(gradient, 1)
            means = await round_.settle()
            if means is not None:
                peer.params.copy_(anchor.sub_(means[0]))
                # A mean from zero, divided by the sum of its weights, has the weights beta_t.
                square.mul_(self.beta).addcmul_(means[1], means[1], value=1 - self.beta)
                known.mul_(self.beta).add_(1 - self.beta)
                scale.copy_(square).div_(known).sqrt_().clamp_(min=self.alpha)
