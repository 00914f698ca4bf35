"""Rounds of rules that promise equal replicas: contribute, stage, decide.

See `decentral/members.py` for how a round is decided. A round costs one vote to the roster besides the collective's own
messages, and touches nothing live until it is decided.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from decentral.errors import ConfigError, PeerGone
from decentral.members import Ballot, Members
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Coder, ErrorFeedback, Float32, Wrapper
from decentral.protocols.collectives import ALL_REDUCE, FOLDING, AllReduce, Attempt, Contribution
from decentral.protocols.fragments import Fragment
from decentral.protocols.merge import Mean, Merge, weighted_mean
from decentral.protocols.rule import Newcomers, SyncRule
from decentral.protocols.unsent import coder_of
from decentral.replica import digest, seed_of
from decentral.wire import FrameError

NORMS_KEPT = 16
"""Folds whose median norms say what a usual norm is."""
NORMS = "norms"
"""The slot, one for each piece of a channel's rounds, in which they are kept."""
NORMS_NEEDED = 3
"""With fewer norms nobody can say which of them is the absurd one."""


class AllReduceRule(SyncRule):
    """A rule whose workers settle rounds. How updates travel and are merged is chosen alike for all such rules."""

    newcomers: ClassVar[Newcomers] = "follow"
    rests: ClassVar[bool] = True
    codec: Codec = Float32()
    """How updates travel."""
    all_reduce: AllReduce = "butterfly"
    """Who talks to whom: "butterfly" and "ring" send each update twice in all, "gather" sends it to everybody."""
    merge: Merge = Mean()
    """How the workers' updates become one."""

    @property
    def pieces(self) -> bool:
        """Whether a round may merge the model in several pieces."""
        return False

    def check(self, workers: int) -> None:
        """Refuse codecs and merges that the all-reduce cannot serve."""
        require_reducible(self.codec, self.all_reduce, self.merge)
        self.merge.check(workers)
        if self.pieces and self.merge.whole:
            raise ConfigError(
                f"rule.merge: '{self.merge.spelling()}' judges whole updates, and '{self.spelling()}' merges them in "
                "pieces; choose a merge by coordinates, such as 'median' or 'trimmed_mean'"
            )

    def check_newcomers(self) -> None:
        """Refuse codecs whose memory of past rounds must be the same everywhere, which a newcomer does not have."""
        super().check_newcomers()
        if self.codec.same_participants or self.codec.phases > 1:
            raise ConfigError(
                f"rule.codec: '{self.codec.spelling()}' builds on what all workers have sent before, and this fleet "
                "brings newcomers; take another codec, such as 'int8' or 'topk'"
            )

    def check_other_stages(self) -> None:
        """Refuse codecs and merges whose memory is of pieces of a stage, or of anything else but its parameters."""
        super().check_other_stages()
        remembers = type(self.codec).coder is not Codec.coder
        if remembers and (self.pieces or not isinstance(self.codec, ErrorFeedback)):
            raise ConfigError(
                f"rule.codec: what '{self.codec.spelling()}' remembers cannot be cut anew with the stages of a model; "
                "keep their number and leave pipeline.least out, or take a codec without memory, such as 'int8'"
            )
        if self.merge.centered and self.pieces:
            raise ConfigError(
                f"rule.merge: '{self.merge.spelling()}' remembers a centre for each piece, which cannot be cut anew "
                "with the stages of a model; keep their number and leave pipeline.least out, or take 'mean'"
            )

    def begin(
        self,
        peer: Peer,
        channel: str = "sync",
        fragments: Sequence[Fragment] | None = None,
        *,
        cumulative: bool = True,
    ) -> Round:
        """Begin the next round of a channel; see `Round`."""
        return Round(
            peer, self.codec, self.all_reduce, channel, merge=self.merge, fragments=fragments, cumulative=cumulative
        )

    async def agreed_mean(self, peer: Peer, values: Tensor, weight: int = 1) -> Tensor | None:
        """Return the merge of all members' `values` `[P]`, the same bits for everybody; None if skipped."""
        round_ = self.begin(peer)
        round_.contribute(values, weight=weight)
        means = await round_.settle()
        return None if means is None else means[0]

    def launch(self, peer: Peer, values: Tensor, channel: str = "sync") -> asyncio.Task[list[Tensor] | None]:
        """Begin a channel's next round, with one piece `values` `[P]`, and settle it while the worker goes on.

        The task returns what `Round.settle` does. The channel's next round must not begin before it has ended.
        """
        round_ = self.begin(peer, channel)
        round_.contribute(values)
        return peer.spawn(round_.settle())


class Round:
    """One round on a channel: pieces are reduced in the background as they are contributed, then decided together.

    A channel's rounds follow one another; channels may be in flight at the same time. `fragments[i]` is the part of the
    model that piece i is; None: one piece, the whole model. `group` are those of the cohort whose round it is; empty:
    all. `cumulative` says that after a skipped round the caller's next values contain these once more, as outer
    gradients do that span all steps since the last round; otherwise a codec with memory keeps them for later.
    """

    def __init__(
        self,
        peer: Peer,
        codec: Codec,
        all_reduce: AllReduce = "butterfly",
        channel: str = "sync",
        *,
        merge: Merge | None = None,
        fragments: Sequence[Fragment] | None = None,
        group: tuple[int, ...] = (),
        cumulative: bool = True,
    ) -> None:
        self._peer, self._codec, self._all_reduce = peer, codec, all_reduce
        self._channel = channel
        self._merge = merge or Mean()
        self._fragments = fragments
        self._cumulative = cumulative
        self._number = peer.next_round(channel, voted=True)
        self._group = group
        self._members = peer.party(channel, group)
        self._pieces: dict[int, _Piece] = {}
        self._unheard: dict[int, Tensor] = {}  # a newcomer's pieces: it hears what they come to

    def contribute(self, values: Tensor, index: int = 0, weight: int = 1) -> None:
        """Start reducing `values` `[n]` with the others' piece of that index, in whatever order they contribute them.

        `weight` is what the worker's values count for in a mean (samples, tokens). Values are kept for a second
        attempt: do not change them before `settle` returns.
        """
        peer, name = self._peer, f"{self._channel}.{index}"
        if peer.id not in self._members:
            self._unheard[index] = values
            return
        codec = self._codec
        if codec.shaped:
            spans = self._fragments[index].spans if self._fragments else ((0, peer.layout.size),)
            codec = codec.fit(peer.layout.shapes(spans))
        coder = coder_of(peer, codec, name, lambda: peer.party(self._channel, self._group))
        fold = _Fold(peer, self._merge, name, all_or_none=codec.same_participants)
        self._pieces[index] = piece = _Piece(peer, values, weight, coder, fold)
        piece.start(self._reduction(index))
        peer.contributes(self._channel, self._number)

    def __len__(self) -> int:
        return len(self._pieces) or len(self._unheard)

    @property
    def number(self) -> int:
        """The round's number on its channel, 1 at first, the same at every member."""
        return self._number

    async def settle(self) -> list[Tensor] | None:
        """Return the pieces' means by ascending index, the same bits for every member; None if it was skipped."""
        if self._unheard:
            return await self._hear()
        while True:
            staged = [await self._pieces[index].staged() for index in sorted(self._pieces)]
            whole = [mean for mean in staged if mean is not None]
            checksum = digest(whole) if len(whole) == len(staged) else None
            epoch = self._members.epoch
            ballot = Ballot(self._peer.id, self._channel, self._number, epoch, checksum, self._group)
            decision = await self._peer.vote(ballot)
            if decision.outcome != "again":
                break
            self._members = decision.members
            for index, piece in self._pieces.items():
                piece.start(self._reduction(index))
        self._peer.ended_round(
            self._channel, self._number, decision.outcome, decision.members.ids, cumulative=self._cumulative
        )
        skipped = decision.outcome == "skipped"
        for piece in self._pieces.values():
            if not skipped:
                piece.commit()
            elif self._cumulative:
                piece.coder.undo()
            else:
                piece.coder.abort()
        if self._peer.host is not None:
            await self._peer.host.settled(
                self._channel, self._number, decision, () if skipped else whole, cumulative=self._cumulative
            )
        return None if skipped else whole

    async def _hear(self) -> list[Tensor] | None:
        """Return what the round comes to without this worker, a newcomer."""
        peer, guide = self._peer, self._peer.guide
        if guide is None:
            raise PeerGone("a newcomer has nobody to hear from")
        ballot = Ballot(peer.id, self._channel, self._number, self._members.epoch, None, self._group)
        vote = peer.spawn(peer.vote(ballot))  # its answer may never come, if the others end without this round
        means = await guide.outcome(self._channel, self._number, [self._unheard[i] for i in sorted(self._unheard)])
        decision = await vote
        peer.ended_round(self._channel, self._number, decision.outcome, decision.members.ids)
        if peer.host is not None:  # who takes part on one channel may be a host, and a guest still on another
            await peer.host.settled(self._channel, self._number, decision, means or (), cumulative=self._cumulative)
        return means

    def _reduction(self, index: int) -> _Reduction:
        attempt = Attempt(self._members, self._channel, self._number, str(index))
        return _Reduction(self._peer, self._all_reduce, attempt)


async def agreed_mean(
    peer: Peer, values: Tensor, codec: Codec, all_reduce: AllReduce = "butterfly", channel: str = "sync"
) -> Tensor | None:
    """Return the mean of all members' `values` `[n]`, the same bits for everybody; None if the round was skipped."""
    round_ = Round(peer, codec, all_reduce, channel)
    round_.contribute(values)
    means = await round_.settle()
    return None if means is None else means[0]


class _Piece:
    """One worker's part in one piece of a round, through all attempts at it."""

    def __init__(self, peer: Peer, values: Tensor, weight: int, coder: Coder, fold: _Fold) -> None:
        self._peer, self._values, self._weight = peer, values, weight
        self.coder, self._fold = coder, fold
        self._task: asyncio.Task[Tensor | None] | None = None

    def start(self, reduction: _Reduction) -> None:
        fold = self._fold
        fold.begin()
        reduction.attempt = reduction.attempt._replace(
            weight=self._weight, fold=fold, whole=fold.whole, all_or_none=fold.all_or_none
        )
        self._task = self._peer.spawn(self._stage(reduction))

    async def staged(self) -> Tensor | None:
        assert self._task is not None
        return await self._task

    async def _stage(self, reduction: _Reduction) -> Tensor | None:
        try:
            return await self.coder.mean(self._values, reduction)
        except (PeerGone, TimeoutError, FrameError):
            return None

    def commit(self) -> None:
        self.coder.commit()
        self._fold.commit()


class _Reduction:
    """How a coder talks during one attempt: each call is a mean over the members, under a name of its own."""

    def __init__(self, peer: Peer, all_reduce: AllReduce, attempt: Attempt) -> None:
        self.attempt = attempt
        self._peer, self._mean = peer, ALL_REDUCE[all_reduce]
        self._calls = 0

    @property
    def members(self) -> Members:
        return self.attempt.members

    @property
    def seed(self) -> int:
        return seed_of(self._peer.seed, *self.attempt[1:4])

    async def __call__(self, values: Tensor, codec: Codec) -> Tensor:
        attempt = self.attempt
        if self._calls:
            attempt = attempt._replace(piece=f"{attempt.piece}/{self._calls}")
        self._calls += 1
        return await self._mean(self._peer, values, codec, attempt)


class _Fold:
    """Folds contributions: leaves out those whose norm is absurd, then merges the others.

    A norm is absurd if it is more than `peer.norm_limit` times the running median, which is over the norms of these
    contributions and the medians of the last `NORMS_KEPT` folds, and as many times the median of these alone: what most
    have come to together is usual from now on, or no round would ever teach it. Norms are per element, for folds may be
    of segments of unequal length. What it learns counts when the round is committed.
    """

    def __init__(self, peer: Peer, merge: Merge, name: str, *, all_or_none: bool) -> None:
        self._peer, self._merge, self._name = peer, merge, name
        self.all_or_none = all_or_none
        self._medians: list[float] = []
        self._center: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether contributions must come in one piece."""
        return self._merge.whole or self._merge.centered

    def begin(self) -> None:
        """Another attempt begins: forget what was learnt in the last one."""
        self._medians, self._center = [], None

    def __call__(self, contributions: list[Contribution]) -> Tensor:
        if not isinstance(contributions[0].values, Tensor):  # phantoms have no norm
            return weighted_mean([each.values for each in contributions], [each.weight for each in contributions])
        judged = self._peer.norm_limit and not self.all_or_none
        usual = self._usual(contributions) if judged else contributions
        values = [each.values for each in usual]
        if not self._merge.robust:
            return weighted_mean(values, [each.weight for each in usual])
        if not self._merge.centered:
            return self._merge.merge(values, None)
        self._center = self._merge.merge(values, self._slot("center", torch.zeros_like(values[0])))
        return self._center

    def commit(self) -> None:
        """The round is committed."""
        if self._center is not None:
            self._slot("center", self._center).copy_(self._center)
        if self._medians:
            kept = self._slot(NORMS, torch.zeros(NORMS_KEPT))
            kept.copy_(torch.cat([kept, torch.tensor(self._medians)])[-NORMS_KEPT:])

    def _slot(self, name: str, like: Tensor) -> Tensor:
        return self._peer.slot(f"{self._name}.{name}", like)

    def _usual(self, contributions: list[Contribution]) -> list[Contribution]:
        per_element = max(1, contributions[0].values.numel()) ** -0.5
        norms = [float(torch.linalg.vector_norm(each.values)) * per_element for each in contributions]
        kept = self._slot(NORMS, torch.zeros(NORMS_KEPT))
        known = [*(norm for norm in kept.tolist() if norm > 0), *norms]
        of_these = statistics.median_low(norms)
        median = max(statistics.median_low(known), of_these)
        if len(known) < NORMS_NEEDED or median == 0:
            usual = contributions
        else:
            usual = []
            for each, norm in zip(contributions, norms, strict=True):
                if norm <= self._peer.norm_limit * median:
                    usual.append(each)
                else:
                    error = FrameError("norm", f"norm {norm:.3g} where {median:.3g} is usual")
                    self._peer.refuse(each.worker, error)
        self._medians.append(of_these)
        return usual


def require_reducible(codec: Codec, all_reduce: AllReduce, merge: Merge) -> None:
    """Raise `ConfigError` if a mean of vectors sent by `codec` cannot be made by that all-reduce and merge."""
    inner = codec.codec if isinstance(codec, Wrapper) else codec
    name = codec.spelling() if inner is codec else f"{type(codec).name}' around '{inner.spelling()}"
    if merge.robust and all_reduce != "gather":
        raise ConfigError(
            f"rule.all_reduce: merge '{merge.spelling()}' trusts nobody's arithmetic, so every worker must hear all "
            f"others: set all_reduce to 'gather' (got '{all_reduce}')"
        )
    if merge.robust and (inner.linear or codec.same_participants):
        raise ConfigError(
            f"rule.merge: '{merge.spelling()}' needs each worker's own update, and codec '{name}' makes sums alone; "
            "take merge 'mean' or another codec"
        )
    if codec.same_participants and all_reduce != "gather":
        raise ConfigError(
            f"rule.all_reduce: with codec '{name}' every worker must hear each other one's change as it is; set it to "
            "'gather'"
        )
    if inner.loss in ("contractive", "unbiased") and not inner.linear and all_reduce != "gather":
        raise ConfigError(
            f"rule.all_reduce: codec '{name}' leaves most of a vector out, and '{all_reduce}' encodes sums once more; "
            "set all_reduce to 'gather', which encodes each update once"
        )
    if inner.grain == 0 and not inner.linear and all_reduce in ("butterfly", "ring"):
        raise ConfigError(
            f"rule.all_reduce: codec '{name}' cannot be cut into chunks, as '{all_reduce}' does; set it to 'gather'"
        )
    if isinstance(codec, ErrorFeedback) and all_reduce not in FOLDING:
        raise ConfigError(
            f"rule.all_reduce: with codec '{name}' a worker must know what others heard of it, and '{all_reduce}' "
            "encodes partial sums; set it to 'butterfly' or 'gather'"
        )
