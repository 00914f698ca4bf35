"""Looking at this machine, at those that answer, or at a whole cluster, and what is to be said of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from decentral.config import Run
from decentral.doctor import checks, clocks, links
from decentral.doctor.finding import Finding
from decentral.doctor.post import Post
from decentral.doctor.visits import Visit, visit
from decentral.workers import rpc

HERE = "this machine"


def examine_here(run: Run, peers: Sequence[str], secret: str) -> list[Finding]:
    """Return the findings on this machine and on those who listen at these addresses (host:port) with that secret.

    Raises `ConfigError` for certificates that cannot be read, if there are peers.
    """

    async def go() -> list[Visit]:
        keys = rpc.Keys.here(secret, run.real.certificates)
        return [await visit(HERE, peer, peer, keys, measure=True) for peer in peers]

    visits = asyncio.run(go()) if peers else []
    nodes = {HERE: checks.look(run)} | {visit.target: visit.seen for visit in visits if not visit.error}
    return [*checks.judge(nodes, run), *_between(visits, run)]


def examine_cluster(run: Run, address: str) -> list[Finding]:
    """Return the findings on all nodes of the Ray cluster at the address. Raises `RunError`."""
    from decentral.doctor.cluster import visits_on  # nothing else here needs Ray

    visits = visits_on(address, run)
    nodes = {visit.target: visit.seen for visit in visits if visit.source == visit.target and not visit.error}
    others = [visit for visit in visits if visit.source != visit.target]
    return [*checks.judge(nodes, run), *_between(others, run)]


def _between(visits: Sequence[Visit], run: Run) -> Iterator[Finding]:
    yield from clocks.judge(visits)
    yield from links.judge(visits, run)


def listen(run: Run, port: int, secret: str, started: Callable[[str], None]) -> None:
    """Be looked at by other machines' doctors until Ctrl-C; `started` is told the address (host:port).

    Raises `ConfigError` for certificates that cannot be read, and `RunError` for a port that cannot be had.
    """

    async def serve() -> None:
        post = Post(run, rpc.Keys.here(secret, run.real.certificates))
        try:
            started(await post.start(_host_here(), port))
            await asyncio.Event().wait()
        finally:
            await post.close()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


def _host_here() -> str:
    """Return the address of the interface by which this machine reaches others."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect(("192.0.2.1", 9))  # nobody's address, and nothing is sent
            host: str = way.getsockname()[0]
    except OSError:
        return "127.0.0.1"
    return host
