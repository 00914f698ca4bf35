"""Population based training: groups of workers train apart, and the worst go on from the best ones' models."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.collectives import chunk_bounds
from decentral.protocols.copying import give, take
from decentral.protocols.outer import Outer, OuterSGD
from decentral.protocols.population import best, clipped, donors, drawn, explored
from decentral.protocols.rounds import AllReduceRule, Round, agreed_mean
from decentral.protocols.schedule import EqualPeriod, Every, FixedPeriod

WORST = 1e30
"""What a group's loss counts for if it is no number, or a larger one."""

Range = tuple[PositiveFloat, PositiveFloat]


class PBT(AllReduceRule):
    """Groups with learning rates of their own; now and then the worst copy the best and vary their rates.

        every H local steps in group g:  anchor_g <- outer_g(anchor_g, mean over g (anchor_g - theta_i))
                                         theta_i <- anchor_g
        every R local steps:             each of the worst ceil(q G) of G groups copies one of as many best, and
                                         rate <- anew from its bounds with probability p, else 0.8 rate or 1.2 rate
        at the end:                      all take over the best group's model

    Jaderberg et al., arXiv 1711.09846, by its abstract and Ray Tune's implementation; a member of the population is a
    group. A group's score is its loss on the task's held-out data, which its workers compute and the others believe.
    Groups wait for each other at a comparison; in the paper and in Ray each goes on in its own time. A copy is the
    model, the outer momentum and the inner optimiser's running means, sent worker to worker in float32; a group takes
    it over if it has come to all its workers, and otherwise goes on from its own model with the new rates. What is
    evaluated during the run is the first group's model. One group is DiLoCo; with the default `outer`, local SGD.
    """

    name = "pbt"
    unaccountable = "a group that copies another one's model drops its own"
    needs_whole_model = "groups are scored by their whole models"
    needs_task = "it asks for the held-out loss"
    newcomers = "none"
    period: EqualPeriod = Every(period=50)
    """Local steps between rounds inside a group (H)."""
    ready: FixedPeriod = 500
    """Local steps between comparisons (R); a phase that would go beyond ends with it."""
    groups: PositiveInt = 4
    """Groups (G): neighbours by worker number, as equal in size as can be."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the groups that copy, and of those that are copied (q)."""
    resample: float = Field(default=0.25, ge=0, le=1)
    """Chance of a rate to be drawn anew (p), uniform in its logarithm."""
    factors: Range = (0.8, 1.2)
    """What a rate is otherwise multiplied by, one or the other."""
    lr: Range | None = (1e-4, 1e-2)
    """Bounds of the inner learning rate at its peak; unset: it stays the inner optimiser's own."""
    outer_lr: Range | None = None
    """Bounds of the outer learning rate; unset: it stays the outer optimiser's own."""
    outer: Outer = OuterSGD()
    """Outer optimiser inside a group; its momentum starts at zero."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> PBT:
        for field, bounds in (("lr", self.lr), ("outer_lr", self.outer_lr)):
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{field} {bounds}: the smallest rate comes first")
        return self

    def check(self, workers: int) -> None:
        """Refuse groups without workers, and merges that the smallest group is too small for."""
        if self.groups > workers:
            raise ConfigError(f"rule.groups: {self.groups} groups need as many workers, the fleet has {workers}")
        super().check(workers // self.groups)

    async def run(self, peer: Peer) -> None:
        anchor, momentum = peer.slot("anchor", peer.params), peer.slot("momentum")
        rates = peer.slot("rates", self._first_rates(peer)).view(-1, 2)
        groups = [peer.cohort.ids[start:stop] for start, stop in chunk_bounds(len(peer.cohort), self.groups)]
        mine = next(index for index, group in enumerate(groups) if peer.id in group)
        self._set_rate(peer, rates[mine])
        while await peer.train(min(self.period.steps(peer), self.ready - peer.step % self.ready)):
            round_ = Round(peer, self.codec, self.all_reduce, "group", merge=self.merge, group=groups[mine])
            round_.contribute(anchor - peer.params)
            means = await round_.settle()
            if means is not None:
                self._outer(rates[mine]).step(anchor, means[0], momentum)
                peer.params.copy_(anchor)
            if len(groups) > 1 and not (peer.step % self.ready and peer.steps_left):
                await self._compare(peer, groups, mine, rates)
                self._set_rate(peer, rates[mine])

    def _set_rate(self, peer: Peer, rates: Tensor) -> None:
        if self.lr is not None:
            peer.set_learning_rate(float(rates[0]))

    def _outer(self, rates: Tensor) -> Outer:
        return self.outer if self.outer_lr is None else self.outer.model_copy(update={"lr": float(rates[1])})

    def _first_rates(self, peer: Peer) -> Tensor:
        """Return the groups' inner and outer learning rates, `[G * 2]`: the first group begins with the run's own."""
        own = list(zip((peer.inner.lr, self.outer.lr), (self.lr, self.outer_lr), strict=True))
        first, chance = [clipped(rate, bounds) if bounds else rate for rate, bounds in own], peer.rng("pbt", 0)
        others = [[drawn(bounds, chance) if bounds else rate for rate, bounds in own] for _ in range(1, self.groups)]
        return torch.tensor([first, *others]).view(-1)

    async def _compare(self, peer: Peer, groups: list[tuple[int, ...]], mine: int, rates: Tensor) -> None:
        """Score the groups, have the worst copy the best, and change `rates` `[G, 2]`; without scores do nothing."""
        number = peer.next_round("copy")
        losses = await self._losses(peer, groups[mine])
        there = [[worker for worker in group if worker in losses] for group in groups]
        scores = {index: sum(losses[w] for w in group) / len(group) for index, group in enumerate(there) if group}
        chance = peer.rng("pbt", number)
        if peer.steps_left or not scores:
            copying = donors(scores, self.quantile, chance)
        else:
            copying = dict.fromkeys(sorted(scores.keys() - {best(scores)}), best(scores))
        parts = self._parts(peer)
        for taker, donor in copying.items():
            if donor == mine:
                give(peer, parts, there[donor], groups[taker], number)
        if mine in copying and await take(peer, parts, there[copying[mine]], groups[mine], number):
            peer.params.copy_(parts["anchor"])
        if peer.steps_left:
            bounds = (self.lr, self.outer_lr)
            for taker, donor in copying.items():
                near = explored(rates[donor].tolist(), bounds, chance, self.resample, self.factors)
                rates[taker] = torch.tensor(near)

    async def _losses(self, peer: Peer, group: tuple[int, ...]) -> dict[int, float]:
        """Return the held-out loss that each worker has found, the same for everybody; none if it was not agreed."""
        loss = (await peer.evaluate(mean_of=peer.party("group", group))).get("loss", 0.0)
        told = torch.zeros(2, len(peer.cohort))  # each worker's loss, and that it is there
        told[:, peer.cohort.rank(peer.id)] = torch.tensor([loss if loss < WORST else WORST, 1.0])
        mean = await agreed_mean(peer, told.view(-1), Float32(), channel="scores")
        if mean is None:
            return {}
        losses, there = mean.view(2, -1).tolist()
        return {worker: losses[k] / there[k] for k, worker in enumerate(peer.cohort) if there[k]}

    def _parts(self, peer: Peer) -> dict[str, Tensor]:
        """Return what a copy consists of, by name, each `[P]` and live: the model alone if nobody trains on."""
        if not peer.steps_left:
            return {"anchor": peer.slot("anchor")}
        states = {name: peer.inner_state(name) for name in (*peer.inner.momenta, *peer.inner.variances)}
        outer = {"momentum": peer.slot("momentum")} if getattr(self.outer, "momentum", True) else {}
        return {"anchor": peer.slot("anchor"), **outer, **states}
