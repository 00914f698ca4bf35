"""The coordinator over real sockets: who may join, how rounds are decided, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgpack
import pytest

from decentral.errors import RunError
from decentral.journal import Joined, Left, Record
from decentral.members import Ballot, Decision, Members
from decentral.workers import rpc
from decentral.workers.coordinator import Coordinator, Entrant, Gone
from decentral.workers.coordinator_rpc import SERVICE, CoordinatorClient, CoordinatorServer
from decentral.workers.ledger import Ledger
from decentral.workers.resume import Resumption
from decentral.workers.transport import Contact, Sign

SECRET = "0123456789abcdef"
KEYS = rpc.Keys(SECRET)
METHODS = ("join", "vote", "watch", "report", "lease", "suspect", "leave")


class Served:
    """A coordinator, its address and a client for each worker."""

    def __init__(
        self, coordinator: Coordinator, server: CoordinatorServer, address: str, clients: list[CoordinatorClient]
    ) -> None:
        self.coordinator, self.address, self.clients = coordinator, address, clients
        self.stop = server.stop

    async def join_all(self) -> None:
        await asyncio.gather(*[client.join(entrant(worker), 10) for worker, client in enumerate(self.clients)])


@asynccontextmanager
async def served(workers: int, **options: Any) -> AsyncIterator[Served]:
    coordinator = Coordinator(range(workers), **{"silence_s": 60.0, **options})
    server = CoordinatorServer(coordinator, KEYS)
    address = await server.start("127.0.0.1", 0)
    clients = [CoordinatorClient(address, worker, KEYS) for worker in range(workers)]
    try:
        yield Served(coordinator, server, address, clients)
    finally:
        for client in clients:
            await client.close()
        await server.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main, 60)

    asyncio.run(bounded())


def entrant(worker: int, life: int = 0, digest: int = 7, parameters: int = 100, address: str = "") -> Entrant:
    return Entrant(worker, life, address or f"10.0.0.{worker}:{life + 1}", digest, parameters)


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
            for welcome in (last, *[await task for task in early]):
                assert (welcome.members, welcome.incarnation, welcome.host) == (Members(0, (0, 1, 2)), 0, None)
                assert welcome.contacts == {worker: Contact(0, f"10.0.0.{worker}:1") for worker in range(3)}
            assert here.coordinator.poll(0)["joined"] == 3

    run(main())


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (entrant(1, digest=8), "workers 0 and 1 start from different weights"),
        (entrant(1, parameters=99), "worker 1 has a model of 99 parameters, worker 0 one of 100"),
        (entrant(0, address="10.0.0.9:9"), "worker 0 has joined already"),
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
            assert here.coordinator.poll(0)["joined"] == 1
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
            here.coordinator.remove(2, 0, "crashed")
            contacts = {worker: Contact(0, f"10.0.0.{worker}:1") for worker in (0, 1)}
            assert await watching == (Members(1, (0, 1)), contacts)
            assert [decision.outcome for decision in await voting] == ["committed", "committed"]
            assert (await here.clients[1].watch(0))[0] == Members(1, (0, 1))  # who asks late is told at once
            with pytest.raises(RunError, match="worker 2 is not in the run"):
                await here.clients[2].vote(Ballot(2, "sync", 2, 0, 9), 10)

    run(main())


def test_a_watch_without_news_is_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decentral.workers.coordinator.WATCH_S", 0.1)

    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            assert (await here.clients[0].watch(0))[0] == Members(0, (0, 1))

    run(main())


def test_who_gives_no_sign_of_life_is_removed_unless_it_was_us_who_slept() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        async with served(3, silence_s=10.0, clock=lambda: now) as here:
            await here.join_all()
            assert here.coordinator.poll(0)["gone"] == []
            for later in (4.0, 8.0, 12.0):
                now = later
                await here.clients[0].report(0, [])
                await here.clients[1].report(0, [])
                stalled = here.coordinator.poll(0)["gone"]
            assert stalled == [Gone(2, 0, "stalled")]
            assert here.coordinator.members == Members(1, (0, 1))
            assert here.coordinator.poll(0)["gone"] == stalled  # as long as the driver has not seen to it
            here.coordinator.remove(2, 0, "stalled")
            assert here.coordinator.poll(0)["gone"] == []
            now = 100.0
            assert here.coordinator.poll(0)["gone"] == []
            assert here.coordinator.members == Members(1, (0, 1))

    run(main())


# Coming later, coming back.


def test_a_run_begins_once_however_often_it_is_told_to() -> None:
    """The driver says so again when a coordinator dies before it has answered, or as the last worker comes."""

    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            voting = [asyncio.create_task(here.clients[0].vote(Ballot(0, "sync", 1, 0, 7), 10))]
            await asyncio.wait(voting, timeout=0.3)
            here.coordinator.begin()
            voting.append(asyncio.create_task(here.clients[1].vote(Ballot(1, "sync", 1, 0, 7), 10)))
            assert [(await vote).outcome for vote in voting] == ["committed"] * 2

    run(main())


@pytest.mark.parametrize("back", [True, False])
def test_who_was_given_up_before_the_run_began_is_not_welcomed_as_another(back: bool) -> None:
    async def main() -> None:
        async with served(2) as here:
            given_up = asyncio.create_task(here.clients[1].join(entrant(1), 10))
            await asyncio.wait([given_up], timeout=0.3)
            here.coordinator.remove(1, 0, "crashed")
            others = [here.clients[0].join(entrant(0), 10)]
            again = CoordinatorClient(here.address, 1, KEYS)
            others += [again.join(entrant(1, life=1), 10)] if back else []
            welcomes = [asyncio.create_task(other) for other in others]
            await asyncio.wait(welcomes, timeout=0.3)
            here.coordinator.begin()
            with pytest.raises(RunError, match="life 0 of worker 1 was given up before the run began"):
                await given_up
            assert [(await welcome).incarnation for welcome in welcomes] == [0] * len(others)
            await again.close()

    run(main())


def test_the_last_record_of_a_life_that_is_replaced_comes_before_the_next_one() -> None:
    """A checkpoint counts a life's records from there: one too few, and resuming would cut the journal short."""

    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            await here.clients[1].report(0, [joined(1)])
            again = CoordinatorClient(here.address, 1, KEYS)
            await again.join(entrant(1, life=1), 10)
            assert [fields["kind"] for fields in here.coordinator.poll(0)["records"]] == ["joined", "left"]
            assert here.coordinator.lines_before[1] == 2
            await again.close()

    run(main())


def test_an_emulated_link_takes_a_vote_there_and_its_decision_back() -> None:
    async def main() -> None:
        async with served(1) as here:
            far = CoordinatorClient(here.address, 0, KEYS, latency_s=0.2)
            await far.join(entrant(0), 10)
            began = asyncio.get_running_loop().time()
            decision = await far.vote(Ballot(0, "sync", 1, 0, 42), 10)
            assert decision.outcome == "committed"
            assert asyncio.get_running_loop().time() - began >= 0.4
            await far.close()

    run(main())


def test_who_comes_late_is_a_guest_of_the_member_with_the_fewest() -> None:
    async def main() -> None:
        async with served(4) as here:
            founders = [asyncio.create_task(here.clients[worker].join(entrant(worker), 10)) for worker in (0, 1)]
            await asyncio.wait(founders, timeout=0.3)
            here.coordinator.begin()
            assert [(await founder).members for founder in founders] == [Members(0, (0, 1))] * 2
            late = [await here.clients[worker].join(entrant(worker), 10) for worker in (2, 3)]
            assert sorted([late[0].host or 0, late[1].host or 0]) == [0, 1]
            assert late[1].members.ids == (0, 1, 2, 3)
            assert set(late[1].members.guests) == {2, 3}
            assert late[1].contacts[3] == Contact(0, "10.0.0.3:1")
            assert late[1].elapsed_s > 0

    run(main())


def test_the_next_life_of_a_worker_takes_the_place_of_the_one_before() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            again = CoordinatorClient(here.address, 1, KEYS)
            welcome = await again.join(entrant(1, life=1), 10)
            assert (welcome.incarnation, welcome.host) == (1, 0)
            assert welcome.members.departed == (1,)
            assert set(welcome.members.guests) == {1}
            with pytest.raises(RunError, match="incarnation 0 of worker 1 has been replaced by 1"):
                await here.clients[1].vote(Ballot(1, "sync", 1, 0, 7), 10)
            with pytest.raises(RunError, match="life 0 of worker 1 has been replaced by 1"):
                await here.clients[1].join(entrant(1), 10)
            here.coordinator.remove(1, 0, "crashed")  # the driver hears late that the first life is over
            assert 1 in here.coordinator.members
            await again.close()

    run(main())


def test_who_came_late_and_takes_part_lets_others_in() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            late, later = (CoordinatorClient(here.address, worker, KEYS) for worker in (1, 0))
            await late.join(entrant(1, life=1), 10)
            with pytest.raises(RunError, match="nobody is left who could let a newcomer in"):
                await later.join(entrant(0, life=1), 10)
            await late.vote(Ballot(1, "", 0, 0, None), 10)
            assert (await later.join(entrant(0, life=1), 10)).host == 1
            assert here.coordinator.status("a run")["guests"] == [0]
            await late.close()
            await later.close()

    run(main())


def test_nobody_comes_to_a_run_that_everybody_has_left() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            for worker in (0, 1):
                here.coordinator.remove(worker, 0, "crashed")
            with pytest.raises(RunError, match="nobody is left who could let a newcomer in"):
                await here.clients[1].join(entrant(1, life=1), 10)

    run(main())


# Doubts.


@pytest.mark.parametrize(("sign", "outcome"), [("gone", "committed"), ("silent", "skipped"), ("alive", None)])
def test_who_is_suspected_is_called(sign: Sign, outcome: str | None) -> None:
    """Of two members one is left: it goes on if the other is surely dead, and not if that may be beyond a cut."""
    called = []

    async def call(address: str) -> Sign:
        called.append(address)
        return sign

    async def main() -> None:
        async with served(2, call=call) as here:
            await here.join_all()
            await here.clients[0].suspect(1, 1)  # an incarnation that there never was
            assert not called
            voting = asyncio.create_task(here.clients[0].vote(Ballot(0, "sync", 1, 0, 7), 10))
            await here.clients[0].suspect(1, 0)
            assert called == ["10.0.0.1:1"]
            done, _ = await asyncio.wait([voting], timeout=5 if outcome else 0.3)
            assert {task.result().outcome for task in done} == ({outcome} if outcome else set())
            if sign == "silent":
                assert here.coordinator.poll(0)["gone"] == [Gone(1, 0, "stalled")]
                here.coordinator.remove(1, 0, "crashed")  # now it is certain
                decision = await here.clients[0].vote(Ballot(0, "sync", 2, 1, 7), 10)
                assert decision.outcome == "committed"
            voting.cancel()

    run(main())


# A coordinator that dies.


def test_a_coordinator_goes_on_from_its_ledger(tmp_path: Path) -> None:
    """Members, decisions, failed attempts, newcomers and records are what they were; open votes are handed in again."""
    path = tmp_path / "run.ledger"

    async def before() -> None:
        async with served(4, ledger=Ledger(path)) as here:
            await here.join_all()
            await asyncio.gather(*[here.clients[w].vote(Ballot(w, "sync", 1, 0, 7), 10) for w in range(4)])
            waits = asyncio.create_task(here.clients[1].vote(Ballot(1, "sync", 2, 0, 8), 10))
            await asyncio.wait([waits], timeout=0.3)
            here.coordinator.remove(3, 0, "crashed")
            assert (await here.clients[0].vote(Ballot(0, "sync", 2, 0, None), 10)).outcome == "again"
            assert (await waits).outcome == "again"
            await here.clients[0].report(0, [joined(0), joined(0)])
            assert len(here.coordinator.poll(0)["records"]) == 2
            here.coordinator.poll(1)
            again = CoordinatorClient(here.address, 3, KEYS)
            assert (await again.join(entrant(3, life=1), 10)).host == 0
            await again.close()

    async def after() -> None:
        async with served(4, ledger=Ledger(path)) as here:
            for worker, client in enumerate(here.clients):
                client._incarnation = int(worker == 3)
            members = here.coordinator.members
            assert (members.ids, members.departed, set(members.guests)) == ((0, 1, 2, 3), (3,), {3})
            assert here.coordinator.contacts[3] == Contact(1, "10.0.0.3:2")
            poll = here.coordinator.poll(1)
            assert (len(poll["records"]), poll["begun"], (3, 1) in poll["lives"]) == (1, True, True)
            late = await here.clients[2].vote(Ballot(2, "sync", 2, 0, 8), 10)
            assert (late.outcome, late.members.ids) == ("again", (0, 1, 2))
            guest = asyncio.create_task(here.clients[3].vote(Ballot(3, "sync", 2, 0, None), 10))
            await asyncio.wait([guest], timeout=0.3)
            votes = [here.clients[worker].vote(Ballot(worker, "sync", 2, 1, 9), 10) for worker in range(3)]
            for decision in await asyncio.gather(*votes):
                assert (decision.outcome, decision.members.ids) == ("degraded", (0, 1, 2))
                assert decision.now.party("sync").ids == (0, 1, 2, 3)
            assert (await here.clients[0].vote(Ballot(0, "sync", 1, 0, 1), 10)).outcome == "committed"
            await here.clients[0].report(1, [joined(0), joined(0)])  # of which it had the first
            assert len(here.coordinator.poll(1)["records"]) == 2

    run(before())
    with path.open("ab") as ledger:
        ledger.write(msgpack.packb(["stand", 2])[:-1])  # it died while it wrote
    run(after())
    run(before_is_over(path))


def test_whom_a_coordinator_took_out_its_successor_names_too(tmp_path: Path) -> None:
    """Otherwise nobody would ever end a worker that hangs, nor replace it."""
    path, now = tmp_path / "run.ledger", 0.0

    async def before() -> None:
        nonlocal now
        async with served(3, ledger=Ledger(path), silence_s=10.0, clock=lambda: now) as here:
            await here.join_all()
            again = CoordinatorClient(here.address, 2, KEYS)
            await again.join(entrant(2, life=1), 10)
            await again.close()
            for later in (4.0, 8.0, 12.0):
                now = later
                await here.clients[0].report(0, [])
                here.clients[2]._incarnation = 1
                await here.clients[2].report(0, [])
                here.coordinator.poll(0)  # the answer is lost

    async def after() -> None:
        nonlocal now
        async with served(3, ledger=Ledger(path), silence_s=10.0, clock=lambda: now) as here:
            assert here.coordinator.poll(0)["gone"] == [Gone(1, 0, "stalled")]
            here.coordinator.remove(1, 0, "stalled")
            for later in (16.0, 20.0, 24.0):  # now the guest falls silent, before it has said a word
                now = later
                await here.clients[0].report(0, [])
                gone = here.coordinator.poll(0)["gone"]
            assert gone == [Gone(2, 1, "stalled")]

    run(before())
    run(after())


async def before_is_over(path: Path) -> None:
    """What the second coordinator has decided a third one knows."""
    async with served(4, ledger=Ledger(path)) as here:
        here.clients[1]._incarnation = 0
        assert (await here.clients[1].vote(Ballot(1, "sync", 2, 1, 3), 10)).outcome == "degraded"


def test_members_wait_for_a_coordinator_that_is_on_its_way_back(tmp_path: Path) -> None:
    async def main() -> None:
        ledger = tmp_path / "run.ledger"
        async with served(2, ledger=Ledger(ledger)) as here:
            await here.join_all()
            address, clients = here.address, here.clients
            await here.stop()
            voting = [
                asyncio.create_task(clients[worker].vote(Ballot(worker, "sync", 1, 0, 7), 30)) for worker in (0, 1)
            ]
            done, _ = await asyncio.wait(voting, timeout=0.3)
            assert not done
            again = CoordinatorServer(Coordinator(range(2), silence_s=60.0, ledger=Ledger(ledger)), KEYS)
            await again.start("127.0.0.1", int(address.rpartition(":")[2]))
            assert {(await vote).outcome for vote in voting} == {"committed"}
            await again.stop()

    run(main())


# Records.


def test_records_come_once_and_in_order_even_if_they_are_reported_twice() -> None:
    async def main() -> None:
        async with served(2) as here:
            await here.join_all()
            await here.clients[0].report(0, [joined(0)])
            await here.clients[0].report(0, [joined(0), joined(0)])
            await here.clients[1].report(0, [joined(1)])
            for _ in range(2):  # as when the first answer was lost
                await here.clients[0].leave(2, [left(0)], True, 10)
            for _ in range(2):  # until the driver says that it has them
                kinds = [(fields["kind"], fields["worker"]) for fields in here.coordinator.poll(0)["records"]]
                assert kinds == [("joined", 0), ("joined", 0), ("joined", 1), ("left", 0)]
            assert [fields["kind"] for fields in here.coordinator.poll(3)["records"]] == ["left"]
            assert here.coordinator.poll(4)["records"] == []
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
            request = msgpack.packb({"worker": 0, "incarnation": 0, "first": 0, "records": []})
            code, _ = await raw(here.address, method, request, secret)
            assert code == grpc.StatusCode.UNAUTHENTICATED
            assert here.coordinator.members == Members(0, (0,))

    run(main())


SEAT = {"worker": 0, "incarnation": 0}
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
        {**SEAT, "channel": "sync", "round": 1, "epoch": -1, "digest": 7, "group": [0, "1"]}
    ),
    "no such record": msgpack.packb({**SEAT, "first": 0, "records": [{"kind": "gossip"}]}),
    "record without its fields": msgpack.packb({**SEAT, "first": 0, "records": [{"kind": "left"}]}),
    "somebody else's record": msgpack.packb(
        {**SEAT, "first": 0, "records": [{"kind": "joined", "time_s": 0.0, "worker": 1, "parameters": 1}]}
    ),
    "a record of less than nothing": msgpack.packb(
        {**SEAT, "first": 0, "records": [{"kind": "settled", "time_s": 0.0, "worker": 0, "samples": -4}]}
    ),
    "a record of words": msgpack.packb(
        {**SEAT, "first": 0, "records": [{"kind": "settled", "time_s": 0.0, "worker": 0, "samples": "many"}]}
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
            assert here.coordinator.poll(0)["records"] == []
            await here.clients[0].report(0, [joined(0)])
            assert len(here.coordinator.poll(0)["records"]) == 1

    run(main())


def test_lines_of_the_journal_before_a_checkpoint_are_before_the_lives_that_go_on_from_it() -> None:
    """The next checkpoint adds what these have recorded since: its cut lies behind all of them."""

    async def main() -> None:
        resumed = Resumption("00000001-a", (), {0: 100, 1: 70}, 5.0, None, {})
        async with served(2, resumed=resumed) as here:
            await here.join_all()
            await here.clients[0].report(0, [joined(0)])
            assert here.coordinator.lines_before == {0: 100, 1: 70}

    run(main())


def test_an_absent_coordinator_is_a_run_error_that_names_its_address() -> None:
    async def main() -> None:
        client = CoordinatorClient("127.0.0.1:1", 3, KEYS)
        with pytest.raises(
            RunError, match=r"worker 3: the coordinator at 127\.0\.0\.1:1 did not answer 'leave' within 0"
        ):
            await client.leave(0, [], True, 0.3)
        await client.close()

    run(main())


def test_a_port_in_use_is_a_run_error_that_names_it() -> None:
    async def main() -> None:
        async with served(1) as here:
            port = int(here.address.rpartition(":")[2])
            with pytest.raises(RunError, match=rf"port {port} of 127\.0\.0\.1.*real\.port"):
                await CoordinatorServer(here.coordinator, KEYS).start("127.0.0.1", port)

    run(main())
