"""PALSGD: DiLoCo whose workers step back towards the last common parameters now and then, without talking."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.outer import Nesterov, Outer
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every, Schedule


class PALSGD(AllReduceRule):
    """Local steps with pseudo-synchronisation: with probability p a step pulls towards the anchor and costs nothing.

        with probability p:  theta_i <- theta_i - (alpha lr / p) (theta_i - anchor);    otherwise a gradient step
        every H gradient steps:  anchor <- outer(anchor, mean_i (anchor - theta_i));   theta_i <- anchor

    Naganuma et al., arXiv 2504.18454, from memory of the paper, which counts both kinds of step in H. Here H and the
    budget count gradients alone, so workers with coins of their own meet at the same steps; between two gradient steps
    lie k pulls with probability (1 - p) p^k. Gradient steps are not scaled by 1 / (1 - p): set the inner learning rate.
    p = 0 is DiLoCo.
    """

    name = "palsgd"
    period: Schedule = Every(period=500)
    """Gradient steps between rounds (H)."""
    outer: Outer = Nesterov()
    """Outer optimiser; its momentum starts at zero."""
    probability: float = Field(default=0.1, ge=0, lt=1)
    """Chance that a step is a pull (p)."""
    alpha: float = Field(default=1.0, ge=0)
    """Strength of the pull, in inner learning rates for each step of either kind; one goes to the anchor at most."""

    async def run(self, peer: Peer) -> None:
        anchor = peer.slot("anchor", peer.params)
        momentum = peer.slot("momentum")
        while peer.steps_left:
            await self._phase(peer, anchor, min(self.period.steps(peer), peer.steps_left))
            mean = await self.agreed_mean(peer, anchor - peer.params)
            if mean is not None:
                self.outer.step(anchor, mean, momentum)
                peer.params.copy_(anchor)

    async def _phase(self, peer: Peer, anchor: Tensor, steps: int) -> None:
        """Do `steps` gradient steps, and the pulls that the worker's own coin puts between them."""
        chance = peer.rng(f"palsgd {peer.id}", peer.step)
        while steps:
            straight = next((step for step in range(steps) if chance.random() < self.probability), steps)
            if straight:
                if await peer.train(straight) < straight:  # the round must begin now
                    return
                steps -= straight
            if steps:
                share = self.alpha * peer.learning_rate(peer.step) / self.probability
                peer.params.lerp_(anchor, min(1.0, share))
