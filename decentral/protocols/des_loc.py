"""DES-LOC: parameters and each of the inner optimiser's running means are averaged at periods of their own."""

from __future__ import annotations

from typing import ClassVar

import torch

from decentral.inner import Inner
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import FixedPeriod


class DESLOC(AllReduceRule):
    """Local Adam whose moments, which change more slowly than the parameters, are averaged less often.

        every K_x steps:  x_i <- mean_i x_i;    every K_u:  u_i <- mean_i u_i;    every K_v:  v_i <- mean_i v_i

    Iacob et al., arXiv 2505.22549, from notes on the paper: an average comes before the local step whose number is a
    multiple of its period, K_u = 3 K_x and K_v = 6 K_x, and the inner optimiser is ADOPT with beta2 = 0.9999 (any of
    ours will do; what it does not keep is not averaged). All periods equal is Local Adam. The parameters are averaged
    once more after the last step.

    Each average is a round of its own. What travels is the change since the last one, by `codec`; but variances travel
    as they are and in float32, for a coordinate whose variance was rounded to zero would take a step of lr u / eps.
    """

    name = "des_loc"
    period: FixedPeriod = 32
    """Local steps between averages of the parameters (K_x)."""
    momentum_periods: tuple[FixedPeriod, ...] = ()
    """Local steps between averages of each running mean of the gradient (K_u); the last one serves all that follow.

    Empty: 3 K_x. A period should not be much longer than the mean's half-life, ln 0.5 / ln beta steps.
    """
    variance_period: FixedPeriod | None = None
    """Local steps between averages of the running mean of the squared gradient (K_v); unset: 6 K_x."""

    momentum_ratio: ClassVar[int] = 3
    variance_ratio: ClassVar[int] = 6

    async def run(self, peer: Peer) -> None:
        periods, variances = self.periods(peer.inner), peer.inner.variances
        live = {name: peer.inner_state(name) if name else peer.params for name in periods}
        anchors = {name: peer.slot(f"anchor.{name}") for name in periods if name and name not in variances}
        anchors[""] = peer.slot("anchor", peer.params)
        exact = self.model_copy(update={"codec": Float32()})
        while await peer.train(min(period - peer.step % period for period in periods.values())):
            flights = {}
            for name, period in periods.items():
                if peer.step % period == 0 or not (name or peer.steps_left):
                    here = torch.empty_like(peer.params).copy_(live[name])  # with offloading it is somewhere else
                    if name in variances:
                        flights[name] = exact.launch(peer, here, name)
                    else:
                        flights[name] = self.launch(peer, here.neg_().add_(anchors[name]), name or "sync")
            for name, flight in flights.items():
                means = await flight
                if means is not None:
                    live[name].copy_(means[0] if name in variances else anchors[name].sub_(means[0]))

    def periods(self, inner: Inner) -> dict[str, int]:
        """Return the period of everything that is averaged, the parameters ("") first, then by name of the state."""
        momenta = self.momentum_periods or (self.momentum_ratio * self.period,)
        last = len(momenta) - 1
        return {
            "": self.period,
            **{name: momenta[min(index, last)] for index, name in enumerate(inner.momenta)},
            **dict.fromkeys(inner.variances, self.variance_period or self.variance_ratio * self.period),
        }


class MTDAO(DESLOC):
    """Local steps with slow momenta, which outlive the time between two averages, beside the fresh gradient.

        x <- x - lr [(1 - sum_j omega_j) g + sum_j omega_j u_j] / (sqrt(v) + eps);   x, u_j, v averaged as in DES-LOC

    Iacob et al., arXiv 2510.05361, from a note on the paper: one momentum with beta of 0.995 to 0.999, K = 32 for
    everything. The step is the inner optimiser's: `qhadam`, or `adopt` with `decays` and `weights`, as in the paper's
    runs. With another inner optimiser it is Local Adam.
    """

    name = "mt_dao"
    momentum_periods: tuple[FixedPeriod, ...] = ()
    """Local steps between averages of each momentum (K_j); the last one serves all that follow. Empty: K_x."""
    variance_period: FixedPeriod | None = None
    """Local steps between averages of the running mean of the squared gradient (K_v); unset: K_x."""

    momentum_ratio = 1
    variance_ratio = 1
