"""What every worker of MoDeST answers when it is asked, whatever else it does."""

from __future__ import annotations

from decentral.errors import PeerGone
from decentral.protocols.modest.aggregator import Aggregator
from decentral.protocols.modest.member import Calls
from decentral.protocols.modest.post import ENOUGH, NO, SPENT, YES, Post, read
from decentral.wire import FrameError, Tag, signal_text


async def keep_answering(role: str, post: Post, calls: Calls, aggregator: Aggregator) -> None:
    """Say whether we would "train" or "average", or are at "work", and do it when it comes to that.

    Who asks about a round that is not the newest any more is told which is.
    """
    peer = post.peer
    while True:
        try:
            source, packet = await peer.recv(None, Tag("ask", 0, role))
            round_, committee = read(signal_text(packet))
        except (TimeoutError, PeerGone):
            continue  # nobody has asked for a while
        except FrameError as error:
            peer.refuse(source, error)
            continue
        if role == "work":
            post.answer(source, role, round_, YES if calls.busy or calls.over else NO)
        elif role == "average":
            settled = calls.over or calls.tell_if_newer(source, round_)
            accepted = not settled and aggregator.begin(round_, committee, source)
            post.answer(source, role, round_, YES if accepted else ENOUGH)
        elif calls.over or calls.tell_if_newer(source, round_):
            post.answer(source, role, round_, NO)
        elif peer.steps_left <= 0:
            post.answer(source, role, round_, SPENT)
        else:
            peer.spawn(calls.await_start(source, round_))
            post.answer(source, role, round_, YES)
