"""Gossip: average the parameters with a few others, without any all-reduce."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import exchange, require_dense
from decentral.protocols.exchanges import Exchanges
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import Links, RandomGroups, Topology, require_two

DISTANCES_KEPT = 16
"""Distances heard in the past that say how far from us others usually are."""
DISTANCES_NEEDED = 3
"""With fewer distances nobody can say which of them is the absurd one."""

Clip = PositiveFloat | Literal["auto"] | None
"""How far one other worker may pull us: a norm of parameters, "auto" for the usual distance, None for any distance."""


class Gossip(SyncRule):
    """Decentralised local SGD: every H local steps each worker mixes its parameters with those of its links.

        theta_i <- theta_i + sum_j w_ij (C(theta_j) - C(theta_i))

    D-PSGD, Lian et al., arXiv 1705.09056, with the weights of the topology: 1 / (1 + links of i), and Metropolis where
    links differ in number. Symmetric weights keep the network's mean, whatever the codec C loses; so does the
    exponential graph. Random pairs by default. Replicas stay different. The paper steps from the mixed parameters by
    the gradient at its own; here the mixed ones are what the next steps begin with.

    With `clip` it is ClippedGossip, He et al., arXiv 2202.01545, which stands liars among the links: each difference is
    cut to length tau, and what has no finite norm counts nothing. One tau for all keeps the mean as before; "auto",
    which is each worker's own, does not.
    """

    name = "gossip"
    newcomers = "at once"
    rests = True
    period: Schedule = Every(period=50)
    """Local steps between exchanges (H)."""
    topology: Topology = RandomGroups()
    """Who talks to whom in a round."""
    codec: Codec = Float32()
    """How parameters travel."""
    clip: Clip = None
    """Longest difference from one other worker that counts (tau), in the norm of the parameters; unset: any.

    "auto" takes the median of this round's distances and the last sixteen, and mixes nothing until three are known. The
    paper's code takes the second largest of a round, which a pair does not have.
    """

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)
        self.topology.check(workers)

    def check_other_stages(self) -> None:
        super().check_other_stages()
        if self.clip == "auto":
            raise ConfigError(
                "rule.clip: with 'auto' the usual distance is that of a stage, so stages cannot be cut anew; keep "
                "their number and leave pipeline.least out, or give a distance"
            )

    def exchanges(self) -> Exchanges:
        """What is mixed, and how much of it, takes no time."""
        return Exchanges(self.period, self.topology, self.codec)

    async def run(self, peer: Peer) -> None:
        while await peer.train(self.period.steps(peer)):
            links = self.topology.links(peer, round_ := peer.next_round("pair"))
            await mix(peer, links, self.codec, round_, self.clip, self.topology.weights(peer, links))


async def mix(
    peer: Peer,
    links: Links,
    codec: Codec,
    round_: int,
    clip: Clip = None,
    weights: Mapping[int, float] | None = None,
) -> None:
    """Pull the parameters to the mean over the links, in place; nothing changes if the exchange fails.

    `weights` says what each source counts for, 1 / (1 + sources) if None. No single pull is longer than `clip`.
    """
    others = await exchange(peer, links, peer.params, codec, round_=round_)
    if others:
        counts = weights or dict.fromkeys(others, 1 / (1 + len(others)))
        mine = codec.round_trip(peer.params)
        pulls: list[Tensor] = [theirs.sub_(mine) for theirs in others.values()]
        unclipped = clip is None or not isinstance(mine, Tensor)  # phantoms have no norm
        scales = [1.0] * len(pulls) if unclipped else _scales(peer, pulls, clip)
        for worker, pull, scale in zip(others, pulls, scales, strict=True):
            if scale > 0:  # what is not finite stays so when multiplied by zero
                peer.params.add_(pull, alpha=scale * counts[worker])


def _scales(peer: Peer, pulls: Sequence[Tensor], clip: Clip) -> list[float]:
    """Return how much of each pull counts: min(1, tau / its norm), 0 if that is not finite."""
    norms = [float(torch.linalg.vector_norm(pull)) for pull in pulls]
    longest = clip if isinstance(clip, float) else _usual_distance(peer, norms)
    return [min(1.0, longest / norm) if 0 < norm < math.inf else 0.0 for norm in norms]


def _usual_distance(peer: Peer, norms: Sequence[float]) -> float:
    """Return the median of the distances known, 0 while they are too few, and remember these."""
    kept = peer.slot("distances", torch.zeros(DISTANCES_KEPT))
    known = [norm for norm in [*kept.tolist(), *norms] if 0 < norm < math.inf]
    latest = known[-DISTANCES_KEPT:]
    kept.copy_(torch.tensor([0.0] * (DISTANCES_KEPT - len(latest)) + latest))
    return statistics.median_low(known) if len(known) >= DISTANCES_NEEDED else 0.0
