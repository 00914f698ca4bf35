"""MoDeST: a small committee trains in each round, drawn by hash, and hands the model on to the next."""

from __future__ import annotations

from pydantic import Field

from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import require_dense
from decentral.protocols.modest.aggregator import Aggregator
from decentral.protocols.modest.answering import keep_answering
from decentral.protocols.modest.member import Calls
from decentral.protocols.modest.post import Post
from decentral.protocols.modest.watch import Watch
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule


class MoDeST(SyncRule):
    """In round k a committee of s workers trains for H local steps; the first of the next one's order averages.

        order(k) = workers by hash(k, id);   committee(k) = the first s of order(k) that answer and have steps left
        each of committee(k) sends its model to the first of order(k + 1) that answers, and waits for an answer
        who has floor(s sf) of them, or has waited too long, sends their mean to committee(k + 1)

    De Vos et al., MoDeST, arXiv 2302.13837 (later Plexus), from its code (s = 10, sf = 1). No server: views of who is
    in travel with the models. Whoever gets no answer turns to the next of the order, so that a dead aggregator costs a
    deadline. The others are idle; the run ends when nobody has steps left, and all take the last mean. A worker that
    hears of a newer round while it trains drops its own work.

    Beyond the paper, so that the run goes on whoever dies, and whether or not anybody notices: an aggregator that has
    waited too long makes do with a single model (there with three, and with fewer the round is never taken up again);
    idle workers ask now and then whether somebody is at work, and if nobody is, hand on the models that they have
    (there a round whose committee dies is the last). What it needs is that the living answer within `ping_s`.
    """

    name = "modest"
    unaccountable = "a worker drops what it has trained when it hears of a newer round"
    needs_whole_model = "a worker drops what it has trained when it hears of a newer round"
    period: Schedule = Every(period=50)
    """Local steps in a round (H)."""
    committee: int = Field(default=10, ge=1, le=100)
    """Workers that train in a round (s)."""
    success: float = Field(default=1.0, gt=0, le=1)
    """Share of a committee's models that is enough (sf)."""
    ping_s: float = Field(default=5.0, gt=0)
    """Seconds to wait for an answer from who might train or average."""
    aggregation_s: float = Field(default=300.0, gt=0)
    """Seconds an aggregator waits for models, and idle workers for news before they ask whether somebody is at work."""
    inactivity: int = Field(default=1000, ge=1)
    """Rounds after which somebody who was never seen is not asked any more."""
    codec: Codec = Float32()
    """How models travel: whole, so what a coarse codec loses is lost."""

    def check(self, workers: int) -> None:
        require_dense(self.codec)

    async def run(self, peer: Peer) -> None:
        post = Post(peer, self.codec, self.ping_s, self.inactivity)
        calls = Calls(post, tuple(post.order(1)[: self.committee]), patience_s=2 * self.aggregation_s)
        aggregator = Aggregator(post, calls, size=self.committee, success=self.success, timeout_s=self.aggregation_s)
        for role in ("train", "average", "work"):
            peer.spawn(keep_answering(role, post, calls, aggregator))
        peer.spawn(Watch(post, calls, size=self.committee, quiet_s=self.aggregation_s).keep())
        peer.spawn(calls.hear_the_end())
        while (start := await calls.next()) is not None:
            if start.model is not None:
                peer.params.copy_(start.model)
                await peer.train(self.period.steps(peer))
            await calls.deliver(start, aggregator.add_own)
        peer.params.copy_(calls.last())
