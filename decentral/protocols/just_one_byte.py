"""Just One Byte: workers send how steep the loss is along random directions, and never a vector."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from decentral.errors import ConfigError, PeerGone
from decentral.members import Ballot
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, OneByte, Wrapper
from decentral.protocols.collectives import Attempt, Contribution, all_gather
from decentral.protocols.rule import SyncRule
from decentral.protocols.zeroth_order import direction, slope
from decentral.replica import digest, seed_of
from decentral.wire import FrameError


class JustOneByte(SyncRule):
    """Every step each worker measures a few slopes and sends them to all, a byte each.

        p_ij = (L_i(theta + eps z_ij) - L_i(theta - eps z_ij)) / (2 eps);   g = (1 / sqrt(N)) sum_ij p_ij z_ij

    z_ij is a normal direction that follows from the run's seed, the worker i, the sample j and the round; N slopes come
    together in a round. Zelikman et al., arXiv 2306.10015, and its code, which divides by the root of N. The inner
    optimiser steps on g (there: SGD with rate 0.1), so it steps alike everywhere and replicas stay equal. All slopes of
    a round are of the same batch. A step costs 2 / 3 of a usual one for each sample.
    """

    name = "just_one_byte"
    needs_whole_model = "a worker looks at losses of the whole model"
    needs_task = "it asks for losses"
    samples: int = Field(default=30, ge=1)
    """Slopes that a worker measures in a step."""
    epsilon: float = Field(default=1e-3, gt=0)
    """How far to both sides the loss is looked at (eps)."""
    codec: Codec = OneByte()
    """How slopes travel."""

    def check(self, workers: int) -> None:
        if self.codec.loss not in ("none", "rounding") or isinstance(self.codec, Wrapper):
            raise ConfigError(
                f"rule.codec: '{self.codec.spelling()}' leaves numbers out, and every slope must arrive; choose "
                "'one_byte' or 'float32'"
            )

    async def run(self, peer: Peer) -> None:
        while peer.steps_left:
            round_ = peer.next_round("slopes")
            seeds = [self._seed(peer, peer.id, round_, sample) for sample in range(self.samples)]
            slopes = torch.tensor([await slope(peer, seed, self.epsilon) for seed in seeds])
            heard = await agreed_gather(peer, slopes, self.codec, "slopes", round_)
            peer.grads.zero_()
            for worker, values, _ in heard or []:
                for sample, steepness in enumerate(values.tolist()):
                    along = direction(self._seed(peer, worker, round_, sample), peer.grads)
                    peer.grads.add_(along, alpha=steepness / math.sqrt(len(heard or []) * self.samples))
            await peer.apply_update()

    def _seed(self, peer: Peer, worker: int, round_: int, sample: int) -> int:
        return seed_of(peer.seed, "just one byte", worker, round_, sample)


async def agreed_gather(
    peer: Peer, values: torch.Tensor, codec: Codec, channel: str, round_: int
) -> list[Contribution] | None:
    """Return what each member brought to the channel's round, `[n]` each, the same bits for everybody; None if skipped.

    A round of `Round` whose contributions are not folded into one. Contributions that cannot be used are left out.
    """
    members = peer.members
    peer.hands_in(channel, round_)
    while True:
        try:
            heard = await all_gather(peer, values, codec, Attempt(members, channel, round_))
            checksum = digest([torch.tensor([each.worker for each in heard]), *(each.values for each in heard)])
        except (PeerGone, TimeoutError, FrameError):
            checksum = None
        decision = await peer.vote(Ballot(peer.id, channel, round_, members.epoch, checksum))
        if decision.outcome != "again":
            break
        members = decision.members
    peer.ended_round(channel, round_, decision.outcome, decision.members.ids, cumulative=False)
    return None if decision.outcome == "skipped" else heard
