"""The coordinator over real sockets: who may join, how rounds are decided, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import msgpack
import pytest

from decentral.errors import RunError
from decentral.journal import Joined, Left, Record
from decentral.members import Ballot, Decision, Members
from decentral.workers import rpc
from decentral.workers.coordinator import SERVICE, Coordinator, CoordinatorClient, CoordinatorServer, Entrant

SECRET = "0123456789abcdef"
KEYS = rpc.Keys(SECRET)
METHODS = ("join", "vote", "watch", "report", "leave")


class Served:
    """A coordinator, its address and a client for each worker."""

    def __init__(self, coordinator: Coordinator, address: str, clients: list[CoordinatorClient]) -> None:
        self.coordinator, self.address, self.clients = coordinator, address, clients

    async def join_all(self) -> None:
        await asyncio.gather(*[client.join(entrant(worker), 10) for worker, client in enumerate(self.clients)])


@asynccontextmanager
async def served(workers: int, **options: Any) -> AsyncIterator[Served]:
    coordinator = Coordinator(range(workers), **{"silence_s": 60.0, **options})
    server = CoordinatorServer(coordinator, KEYS)
    address = await server.start("127.0.0.1", 0)
    clients = [CoordinatorClient(address, worker, KEYS) for worker in range(workers)]
    try:
        yield Served(coordinator, address, clients)
    finally:
        for client in clients:
            await client.close()
        await server.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main, 60)

    asyncio.run(bounded())


def entrant(worker: int, digest: int = 7, parameters: int = 100) -> Entrant:
    return Entrant(worker, 0, f"10.0.0.{worker}:1", digest, parameters)


def joined(worker: int) -> Record:
    return Joined(time_s=0.5, worker=worker, parameters=100)


def left(worker: int) -> Record:
    return Left(
        time_s=1.0,
        worker=worker,
        reason="finished",
        step=3,
        seconds={"compute": 1.0},
        sent_bytes=1,
        received_bytes=2,
        messages_sent=3,
    )


# Joining.


def test_everybody_is_told_of_everybody_once_all_are_there() -> None:
    async def main() -> None:
        async with served(3) as here:
            early = [asyncio.create_task(here.clients[worker].join(entrant(worker), 10)) for worker in (2, 0)]
            done, _ = await asyncio.wait(early, timeout=0.3)
            assert not done
            last = await here.clients[1].join(entrant(1), 10)
            for members, entrants in (last, *[await task for task in early]):
                assert members == Members(0, (0, 1, 2))
                assert sorted(entry.worker for entry in entrants) == [0, 1, 2]
                assert all(entry == entrant(entry.worker) for entry in entrants)
            assert here.coordinator.poll()["joined"] == 3

    run(main())


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (entrant(1, digest=8), "workers 0 and 1 start from different weights"),
        (entrant(1, parameters=99), "worker 1 has a model of 99 parameters, worker 0 one of 100"),
        (entrant(0), "worker 0 has joined already"),
        (entrant(5), "worker 5 is not expected"),
    ],
)
def test_who_does_not_fit_is_refused_and_told_why(second: Entrant, reason: str) -> None:
    async def main() -> None:
        async with served(3) as here:
            first = asyncio.create_task(here.clients[0].join(entrant(0), 10))
            await asyncio.wait([first], timeout=0.3)
            with pytest.raises(RunError, match=reason):
                await here.clients[1].join(second, 10)
            assert here.coordinator.poll()["joined"] == 1
            first.cancel()

    run(main())


def test_who_waits_for_the_others_in_vain_is_told() -> None:
    async def main() -> None:
        async with served(2) as here:
            with pytest.raises(RunError, match="did not answer 'join'"):
                await here.clients[0].join(entrant(0), 0.3)

    run(main())


# Rounds and members.


def test_votes_are_answered_when_the_round_is_decided() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            first = asyncio.create_task(here.clients[0].vote(Ballot(0, "sync", 1, 0, 42), 10))
            done, _ = await asyncio.wait([first], timeout=0.3)
            assert not done
            decision = await here.clients[1].vote(Ballot(1, "sync", 1, 0, 42), 10)
            assert decision == await first == Decision("committed", Members(0, (0, 1)), Members(0, (0, 1)))
            votes = [here.clients[worker].vote(Ballot(worker, "sync", 2, 0, worker), 10) for worker in (0, 1)]
            assert [decision.outcome for decision in await asyncio.gather(*votes)] == ["skipped", "skipped"]

    run(main())


def test_a_group_settles_its_round_without_the_others() -> None:
    async def main() -> None:
        async with served(3) as here:
            await here.join_all()
            votes = [here.clients[worker].vote(Ballot(worker, "region", 1, 0, 42, (1, 2)), 10) for worker in (1, 2)]
            decision = Decision("committed", Members(0, (1, 2)), Members(0, (0, 1, 2)))
            assert await asyncio.gather(*votes) == [decision] * 2

    run(main())


def test_a_death_is_told_to_watchers_and_completes_the_round() -> None:
    async def main() -> None:
        async with served(3) as here:
            await here.join_all()
            watching = asyncio.create_task(here.clients[0].watch(0))
            voting = asyncio.gather(
                *[here.clients[worker].vote(Ballot(worker, "sync", 1, 0, 9), 10) for worker in (0, 1)]
            )
            done, _ = await asyncio.wait([watching, voting], timeout=0.3)
            assert not done
            here.coordinator.remove(2)
            assert await watching == Members(1, (0, 1))
            assert [decision.outcome for decision in await voting] == ["committed", "committed"]
            assert await here.clients[1].watch(0) == Members(1, (0, 1))  # who asks late is told at once
            assert (await here.clients[2].vote(Ballot(2, "sync", 2, 0, 9), 10)).outcome == "skipped"

    run(main())


def test_a_watch_without_news_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decentral.workers.coordinator.WATCH_S", 0.1)

    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            assert await here.clients[0].watch(0) == Members(0, (0, 1))

    run(main())


def test_who_gives_no_sign_of_life_is_removed_unless_it_was_us_who_slept() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        async with served(3, silence_s=10.0, clock=lambda: now) as here:
            await here.join_all()
            assert here.coordinator.poll()["silent"] == []
            for later in (4.0, 8.0, 12.0):
                now = later
                await here.clients[0].report(0, [])
                await here.clients[1].report(0, [])
                stalled = here.coordinator.poll()["silent"]
            assert stalled == [2]
            assert here.coordinator.members == Members(1, (0, 1))
            assert here.coordinator.poll()["silent"] == []
            now = 100.0
            assert here.coordinator.poll()["silent"] == []
            assert here.coordinator.members == Members(1, (0, 1))

    run(main())


# Records.


def test_records_come_once_and_in_order_even_if_they_are_reported_twice() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            await here.clients[0].report(0, [joined(0)])
            await here.clients[0].report(0, [joined(0), joined(0)])
            await here.clients[1].report(0, [joined(1)])
            await here.clients[0].leave(2, [left(0)])
            kinds = [(fields["kind"], fields["worker"]) for fields in here.coordinator.drain_records()]
            assert kinds == [("joined", 0), ("joined", 0), ("joined", 1), ("left", 0)]
            assert here.coordinator.drain_records() == []
            assert here.coordinator.members == Members(1, (1,))
            with pytest.raises(RunError, match="worker 0 is not in the run"):
                await here.clients[0].report(3, [joined(0)])

    run(main())


# Strangers and nonsense.


async def raw(address: str, method: str, request: bytes, secret: str | None = SECRET) -> tuple[grpc.StatusCode, str]:
    metadata = () if secret is None else rpc.Keys(secret).metadata
    async with rpc.dial(address, KEYS) as channel:
        try:
            await channel.unary_unary(f"/{SERVICE}/{method}")(request, metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("secret", [None, "", SECRET[:-1], SECRET + "0", "geheim"])
def test_every_call_needs_the_secret(method: str, secret: str | None) -> None:
    async def main() -> None:
        async with served(1) as here:
            request = msgpack.packb({"worker": 0, "first": 0, "records": []})
            code, _ = await raw(here.address, method, request, secret)
            assert code == grpc.StatusCode.UNAUTHENTICATED
            assert here.coordinator.members == Members(0, (0,))

    run(main())


NONSENSE = {
    "not msgpack": b"\xc1",
    "not a map": msgpack.packb([1, 2]),
    "empty": b"",
    "no fields": msgpack.packb({}),
    "wrong types": msgpack.packb(
        {
            "worker": "0",
            "incarnation": None,
            "address": 1,
            "digest": [],
            "parameters": {},
            "channel": 0,
            "round": True,
            "epoch": -1,
            "first": 0.5,
            "records": ["x"],
        }
    ),
    "a group of no numbers": msgpack.packb(
        {"worker": 0, "channel": "sync", "round": 1, "epoch": -1, "digest": 7, "group": [0, "1"]}
    ),
    "no such record": msgpack.packb({"worker": 0, "first": 0, "records": [{"kind": "gossip"}]}),
    "record without its fields": msgpack.packb({"worker": 0, "first": 0, "records": [{"kind": "left"}]}),
    "somebody else's record": msgpack.packb(
        {"worker": 0, "first": 0, "records": [{"kind": "joined", "time_s": 0.0, "worker": 1, "parameters": 1}]}
    ),
}


def test_nonsense_is_refused_and_the_server_goes_on() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            for method in METHODS:
                for name, request in NONSENSE.items():
                    code, reason = await raw(here.address, method, request)
                    assert (code, bool(reason)) == (grpc.StatusCode.FAILED_PRECONDITION, True), (method, name)
            assert here.coordinator.poll()["records"] == []
            await here.clients[0].report(0, [joined(0)])
            assert len(here.coordinator.drain_records()) == 1

    run(main())


def test_an_absent_coordinator_is_a_run_error_that_names_its_address() -> None:
    async def main() -> None:
        client = CoordinatorClient("127.0.0.1:1", 3, KEYS)
        with pytest.raises(RunError, match=r"worker 3: the coordinator at 127\.0\.0\.1:1 did not answer 'report'"):
            await client.report(0, [])
        await client.close()

    run(main())


def test_a_port_in_use_is_a_run_error_that_names_it() -> None:
    async def main() -> None:
        async with served(1) as here:
            port = int(here.address.rpartition(":")[2])
            with pytest.raises(RunError, match=rf"port {port} of 127\.0\.0\.1.*real\.port"):
                await CoordinatorServer(here.coordinator, KEYS).start("127.0.0.1", port)

    run(main())
