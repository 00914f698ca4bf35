"""MoDeST: a small committee trains in each round, drawn by hash, and hands the model on to the next."""

from __future__ import annotations

from pydantic import Field

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import CodecField, Float32
from decentral.protocols.collectives import require_dense
from decentral.protocols.modest.aggregator import Aggregator
from decentral.protocols.modest.member import Calls, Start
from decentral.protocols.modest.post import Post, read
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Period
from decentral.wire import FrameError, Tag, signal_text


class MoDeST(SyncRule):
    """In round k a committee of s workers trains for H local steps; the first of the next one's order averages.

        order(k) = workers by hash(k, id);   committee(k) = the first s of order(k) that answer and have steps left
        each of committee(k) sends its model to the first of order(k + 1) that answers, and waits for an answer
        who has floor(s sf) of them, or has waited too long and has three, sends their mean to committee(k + 1)

    De Vos et al., MoDeST, arXiv 2302.13837 (later Plexus), from its code (s = 10, sf = 1). No server: views of who is
    in travel with the models. Whoever gets no answer turns to the next of the order, so that a dead aggregator costs a
    deadline. The others are idle; the run ends when nobody has steps left, and all take the last mean. A worker that
    hears of a newer round while it trains drops its own work.
    """

    name = "modest"
    period: Period = Every(period=50)
    """Local steps in a round (H)."""
    committee: int = Field(default=10, ge=1, le=100)
    """Workers that train in a round (s)."""
    success: float = Field(default=1.0, gt=0, le=1)
    """Share of a committee's models that is enough (sf)."""
    ping_s: float = Field(default=5.0, gt=0)
    """Seconds to wait for an answer from who might train or average."""
    aggregation_s: float = Field(default=300.0, gt=0)
    """Seconds an aggregator waits for models."""
    inactivity: int = Field(default=1000, ge=1)
    """Rounds after which somebody who was never seen is not asked any more."""
    codec: CodecField = Float32()
    """How models travel: whole, so what a coarse codec loses is lost."""

    def check(self, workers: int) -> None:
        require_dense(self.codec)

    async def run(self, peer: Peer) -> None:
        post = Post(peer, self.codec, self.ping_s, self.inactivity)
        calls = Calls(post, tuple(post.order(1)[: self.committee]))
        aggregator = Aggregator(post, calls, size=self.committee, success=self.success, timeout_s=self.aggregation_s)
        for role in ("train", "average", "news"):
            peer.spawn(_answer(role, post, calls, aggregator))
        peer.spawn(calls.hear_the_end())
        while (start := await calls.queue.get()) is not None:
            peer.params.copy_(start.model)
            if start.committee:
                await peer.train(self.period.steps(peer))
                await calls.deliver(start, aggregator.add_own, 2 * self.aggregation_s)


async def _answer(role: str, post: Post, calls: Calls, aggregator: Aggregator) -> None:
    """Say whether we would train or average when we are asked, and do it when it comes to that."""
    peer = post.peer
    while True:
        try:
            source, packet = await peer.recv(None, Tag("ask", 0, role), among=peer.members)
            round_, committee = read(signal_text(packet))
        except TimeoutError:
            continue  # nobody has asked for a while
        except PeerGone:
            calls.see_who_is_left()
            continue
        except FrameError as error:
            peer.refuse(source, error)
            continue
        if role == "news":
            calls.learn(Start(round_, committee, peer.params))
            continue
        willing = role == "average" or calls.willing(round_)
        if role == "average":
            aggregator.begin(round_, committee)
        elif willing:
            peer.spawn(calls.await_start(source, round_))
        post.answer(source, role, round_, willing)
