"""Nodes that visit one another over real sockets: clocks that differ, links that are thin, and who does not answer."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import pytest

from decentral import profile
from decentral.config import Run, validated
from decentral.doctor import clocks, links, post, visits
from decentral.doctor.checks import CHECKS
from decentral.doctor.post import Post
from decentral.doctor.visits import Visit, visit
from decentral.workers.pace import Pace
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport

KEYS = Keys("of-these-tests-alone")
RUN = validated({"task": {"name": "quadratic"}, "fleet": {"up_bps": 100e6}}, "test")
AHEAD_S = 100.0


def visited(go: Callable[[str], Awaitable[Visit]], run: Run = RUN) -> Visit:
    """Return what comes of going to the address of a post in this process."""

    async def both() -> Visit:
        there = Post(run, KEYS)
        try:
            return await go(await there.start("127.0.0.1"))
        finally:
            await there.close()

    return asyncio.run(both())


def test_a_thin_link_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    down_bps = 40e6

    def thin(keys: Keys, patience_s: float) -> Transport:
        pace = Pace(down_bps=down_bps)
        listener = Transport(profile.Discard(), keys=keys, max_packet_bytes=1 << 28, patience_s=patience_s, pace=pace)
        listener.admit({profile.PROBER: Contact(0, "")})
        return listener

    monkeypatch.setattr(profile, "listener", thin)
    found = visited(lambda address: visit("a", "b", address, KEYS, measure=True))
    assert not found.error
    assert found.bps == pytest.approx(down_bps, rel=0.1)
    assert found.seen.keys() == {check.name for check in CHECKS}
    (finding,) = links.judge([found], RUN)
    assert (finding.level, "where the run file's fleet has 100" in finding.what) == ("warning", True)
    (finding,) = links.judge([found], validated({"task": {"name": "quadratic"}}, "test"))
    assert finding.level == "ok"
    (clock,) = clocks.judge([found])
    assert clock.level == "ok"


def serve_ahead(line: Connection) -> None:
    """Be a node whose clock is ahead of all others."""

    class Ahead:
        @staticmethod
        def time() -> float:
            return time.time() + AHEAD_S

    post.time = Ahead  # type: ignore[assignment]

    async def serve() -> None:
        line.send(await Post(RUN, KEYS).start("127.0.0.1"))
        await asyncio.Event().wait()

    asyncio.run(serve())


def test_a_clock_that_is_ahead_is_found_to_within_half_a_round_trip() -> None:
    ours, theirs = multiprocessing.Pipe()
    node = multiprocessing.get_context("spawn").Process(target=serve_ahead, args=(theirs,), daemon=True)
    node.start()
    try:
        assert ours.poll(60), "the node has not started"
        found = asyncio.run(visit("a", "b", ours.recv(), KEYS, measure=False))
    finally:
        node.kill()
        node.join()
    assert abs(found.ahead_s - AHEAD_S) <= found.latency_s
    (finding,) = clocks.judge([Visit("b", "a", latency_s=0.001, ahead_s=-AHEAD_S), found])
    assert (finding.level, f"{found.ahead_s:.3f} s ahead of a" in finding.what) == ("problem", True)
    (close,) = clocks.judge([Visit("a", "b", latency_s=120.0, ahead_s=100.0)])
    assert close.level == "ok", "it may be the trip"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("another secret", "it has another secret"), ("nobody", "refused"), ("silent", "no answer in time")],
)
def test_who_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, trouble: str, words: str) -> None:
    monkeypatch.setattr(visits, "REACH_S", 1.0)

    async def go(address: str) -> Visit:
        keys = Keys("which-is-another-one") if trouble == "another secret" else KEYS
        with socket.create_server(("127.0.0.1", 0)) as mute:
            there = f"127.0.0.1:{mute.getsockname()[1]}"
            if trouble == "nobody":
                mute.close()
            return await visit("a", "b", address if trouble == "another secret" else there, keys, measure=False)

    found = visited(go)
    (finding,) = links.judge([found], RUN)
    assert (finding.level, found.seen, list(clocks.judge([found]))) == ("problem", {}, [])
    assert words in finding.what
