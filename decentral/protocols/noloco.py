"""NoLoCo: DiLoCo's outer step in small random groups, without any all-reduce."""

from __future__ import annotations

from pydantic import Field

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import conclude, offer, require_dense
from decentral.protocols.exchanges import Exchanges
from decentral.protocols.merge import mean
from decentral.protocols.outer import consensus_momentum
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import RandomGroups, require_two
from decentral.wire import Tag

CHANNEL = "fast"
FAST, SLOW = "theta", "phi"
"""What travels in a round."""


class NoLoCo(SyncRule):
    """Every H local steps a random group of n workers takes an outer heavy-ball step with a pull to its mean.

        velocity_i <- alpha velocity_i + (beta / n) sum_j (theta_j - phi_j) - gamma (phi_i - (1 / n) sum_j phi_j)
        phi_i <- phi_i + velocity_i;   theta_i <- phi_i                            (j over the group of i)

    Gensyn, arXiv 2506.10911, equations 1-3 with the sign of beta as in the appendix and the code. With gamma = beta
    (the default, as in the code) phi cancels and only theta travels; otherwise phi travels ahead, while the workers
    train. A group in which somebody has died, or does not answer within the run's patience, falls back to groups of
    one: velocity <- alpha velocity + beta (theta - phi). Replicas never become equal; they spread around their mean.
    """

    name = "noloco"
    newcomers = "at once"
    rests = True
    period: Schedule = Every(period=50)
    """Local steps between rounds (m)."""
    alpha: float = Field(default=0.5, ge=0, lt=1)
    """Outer momentum."""
    beta: float = Field(default=0.7, gt=0)
    """Outer learning rate."""
    gamma: float | None = Field(default=None, gt=0)
    """Pull to the group's mean; beta if unset."""
    group: int = Field(default=2, ge=2)
    """Workers in a group (n)."""
    codec: Codec = Float32()
    """How weights travel."""

    def check(self, workers: int) -> None:
        """Refuse one worker, and a gamma at which the replicas' spread grows in flat directions."""
        require_two(workers, self.name)
        require_dense(self.codec)
        bound = stability_bound(self.alpha, self.group, workers)
        if self._gamma >= bound:
            raise ConfigError(
                f"rule.gamma: {self._gamma:g} lets the replicas drift apart; with alpha {self.alpha:g}, groups of "
                f"{min(self.group, workers)} and {workers} workers it must be in (0, {bound:.4g})"
            )

    def exchanges(self) -> Exchanges | None:
        """If phi travels too it does so ahead of its round, which is more than an exchange."""
        if self._gamma != self.beta:
            return None
        return Exchanges(self.period, RandomGroups(size=self.group), self.codec, CHANNEL, FAST, slots=2)

    async def run(self, peer: Peer) -> None:
        slow = peer.slot("slow", peer.params)
        velocity = peer.slot("velocity")
        topology = RandomGroups(size=self.group)
        parts = (FAST,) if self._gamma == self.beta else (FAST, SLOW)
        while True:
            round_ = peer.next_round(CHANNEL)
            if SLOW in parts and peer.steps_left:
                # The next partners are known from the seed: phi travels while we train, and waits in their mail.
                offer(peer, topology.links(peer, round_), slow, self.codec, Tag(CHANNEL, round_, SLOW))
            if not await peer.train(self.period.steps(peer)):
                return
            links = topology.links(peer, round_)
            offer(peer, links, peer.params, self.codec, Tag(CHANNEL, round_, FAST))
            heard = await conclude(peer, links, parts, slow, self.codec, channel=CHANNEL, round_=round_)
            fast, *slows = heard or [{} for _ in parts]
            consensus_momentum(
                slow,
                velocity,
                mean([peer.params, *fast.values()]) if fast else peer.params,
                mean([slow, *slows[0].values()]) if slows and slows[0] else slow,
                alpha=self.alpha,
                beta=self.beta,
                gamma=self._gamma,
            )
            peer.params.copy_(slow)

    @property
    def _gamma(self) -> float:
        return self.beta if self.gamma is None else self.gamma


def stability_bound(alpha: float, group: int, workers: int) -> float:
    """Return the gamma below which the expected squared spread shrinks when gradients are zero.

        gamma < 2 (1 - alpha^2) / (1 + alpha - 2 alpha kappa),   kappa = (N - G) / (N - 1)

    for fresh uniform groups, G = ceil(N / n) of them among N workers: the spectral radius of the map of (E|x|^2, E x.v,
    E|v|^2) is 1 there. It replaces the paper's equation 74, whose interval is unstable for large alpha.
    """
    groups = -(-workers // group)  # some one smaller than the others, as `RandomGroups` makes them
    kappa = (workers - groups) / (workers - 1)
    return 2 * (1 - alpha**2) / (1 + alpha - 2 * alpha * kappa)
