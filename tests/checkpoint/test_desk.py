"""The desk: what workers agree on, and every way in which a checkpoint comes to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, ClassVar

import pytest
from lives import live, run_of
from shelf import fleet

from decentral.checkpoint import (
    Abandoned,
    Archive,
    Cut,
    Desk,
    Draft,
    File,
    Order,
    Storage,
    StorageError,
    Uneven,
    keep,
    load,
    make_checkpoint,
    newest,
)
from decentral.checkpoint.contents import describe
from decentral.peer import Peer
from decentral.protocols import DiLoCo, LocalSGD, SyncRule
from decentral.protocols.codecs import Float32
from decentral.protocols.rounds import agreed_mean
from decentral.sim.clock import VirtualLoop

NUMBERS = count()


async def here(work: Callable[[], Any]) -> Any:
    return work()


def virtually(story: Awaitable[None]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(story)
    finally:
        loop.close()


def empty(worker: int) -> File:
    return File(name=f"worker-{worker}.safetensors", nbytes=0, header="0" * 64, pieces=())


async def agreed(desk: Desk, rounds: dict[int, dict[str, int]], taken: dict[int, int]) -> Draft:
    """Have these workers make a checkpoint: they have settled `rounds`, and take their states after round `taken`."""
    draft = desk.begin("00000001-a1", list(rounds))

    async def work(worker: int) -> None:
        folder, _ = await desk.order(worker, "")
        await desk.stand(worker, folder, rounds[worker])
        await desk.describe(worker, folder, describe(worker, fleet(taken[worker])[worker]))
        await desk.wrote(worker, folder, empty(worker))

    works = [asyncio.ensure_future(work(worker)) for worker in rounds]
    try:
        return await draft
    finally:
        await asyncio.gather(*works, return_exceptions=True)


def test_who_begins_anew_after_it_has_described_its_state_ends_the_checkpoint() -> None:
    """It had no answer in time, and has trained on: the others' shares were planned by what it held then."""

    async def story() -> None:
        desk = Desk()
        draft = desk.begin("1", [0, 1])
        await asyncio.gather(*(desk.stand(worker, "1", {"sync": 1}) for worker in (0, 1)))
        described = [desk.describe(worker, "1", describe(worker, fleet(2)[worker])) for worker in (0, 1)]
        await asyncio.gather(*described)
        with pytest.raises(Abandoned, match="worker 1 does not have the state any more that it described"):
            await desk.stand(1, "1", {"sync": 3})
        with pytest.raises(Abandoned, match="worker 1 does not have"):
            await draft

    virtually(story())


def test_at_a_parting_everybody_hears_why_and_nothing_is_written() -> None:
    async def story() -> None:
        desk = Desk()
        draft = desk.begin("nowhere", [0, 1], "cut anew")
        told = await asyncio.gather(*(desk.order(worker, "") for worker in (0, 1)))
        assert told == [Order("nowhere", "cut anew")] * 2
        await asyncio.gather(*(desk.stand(worker, "nowhere", {"sync": 1}) for worker in (0, 1)))
        held = {worker: describe(worker, fleet(2)[worker]) for worker in (0, 1)}
        shares = await asyncio.gather(*(desk.describe(worker, "nowhere", held[worker]) for worker in (0, 1)))
        assert shares == [(), ()]
        assert await draft == Draft("nowhere", held, ())
        desk.left(0, finished=False)  # as all do now: another checkpoint may be begun

    virtually(story())


def test_the_cut_is_ahead_of_everybody_on_the_channel_with_the_most_rounds() -> None:
    async def story() -> None:
        desk = Desk()
        desk.begin("1", [0, 1])
        said = {0: {"sync": 40, "moments": 5, "mine 0": 90}, 1: {"sync": 41, "moments": 5}}
        cuts = await asyncio.gather(*(desk.stand(worker, "1", rounds) for worker, rounds in said.items()))
        assert cuts == [Cut("sync", 42)] * 2

    virtually(story())


def test_workers_that_were_too_quick_make_the_next_attempt_look_further_ahead() -> None:
    async def story() -> None:
        desk = Desk()
        rounds = {0: {"sync": 4}, 1: {"sync": 4}}
        with pytest.raises(Uneven, match=r"workers \[0\] after round 5 of 'sync'; workers \[1\] after round 6"):
            await agreed(desk, rounds, {0: 5, 1: 6})
        desk.begin("2", [0, 1])
        cuts = await asyncio.gather(*(desk.stand(worker, "2", rounds[worker]) for worker in rounds))
        assert cuts == [Cut("sync", 6)] * 2

    virtually(story())


def test_before_the_first_round_there_is_nothing_to_keep() -> None:
    async def story() -> None:
        with pytest.raises(Abandoned, match="no round has been settled yet"):
            await agreed(Desk(), {0: {}, 1: {"sync": 1}}, {})

    virtually(story())


def test_a_worker_that_goes_ends_it_for_all_who_wait() -> None:
    async def story() -> None:
        desk = Desk()
        draft = desk.begin("1", [0, 1])
        waiting = asyncio.ensure_future(desk.stand(0, "1", {"sync": 1}))
        await asyncio.sleep(0)
        desk.left(1, finished=False)
        for future in (draft, waiting):
            with pytest.raises(Abandoned, match="worker 1 has gone"):
                await future
        with pytest.raises(Abandoned, match="checkpoint 1 is over"):
            await desk.stand(1, "1", {"sync": 1})

    virtually(story())


def test_when_somebody_has_finished_no_more_are_begun() -> None:
    async def story() -> None:
        desk = Desk()
        desk.left(1, finished=True)
        with pytest.raises(Abandoned, match="worker 1 has finished"):
            desk.begin("1", [0])

    virtually(story())


class Silent(Desk):
    """Never hears that worker 1 has written."""

    async def wrote(self, worker: int, folder: str, file: File) -> None:
        if worker != 1:
            await super().wrote(worker, folder, file)


class Full(Storage):
    """Has no space for what worker 1 writes."""

    def write(self, name: str, pieces: Any) -> None:
        if "worker-1" in name:
            raise StorageError(f"{self.url}: cannot write {name}: No space left on device")
        super().write(name, pieces)


def trained(desk: Desk, storage: Storage) -> tuple[str, list[str], dict[int, int]]:
    """Train with checkpoints; return how the first ended, the folders there are, and the steps that workers did."""
    ended = ""

    async def beside(peers: dict[int, Peer]) -> None:
        nonlocal ended
        archive = Archive(storage, "a1", keep=2)
        archive.claim(resume=False)
        for peer in peers.values():
            peer.spawn(keep(peer, desk, storage, here))
        while any(not peer.rounds_settled for peer in peers.values()):
            await asyncio.sleep(0.01)
        try:
            await make_checkpoint(desk, archive, list(peers), here, run={}, timeout_s=1.0)
            ended = "committed"
        except Abandoned as error:
            ended = str(error)

    run = run_of(DiLoCo(period=3), steps=60)
    lives = live(run, beside=beside)
    folders = sorted({name.split("/")[0] for name in storage.sizes() if "/" in name})
    return ended, folders, {worker: peer.step for worker, peer in lives.peers.items()}


@pytest.fixture
def place() -> str:
    return f"memory://desk/{next(NUMBERS)}"


ALL = {0: 60, 1: 60, 2: 60}


def test_a_worker_that_never_reports_its_part_costs_a_checkpoint_and_no_training(place: str) -> None:
    ended, _, steps = trained(Silent(), Storage(place))
    assert ended == "it was not written within 1 s: workers [1] have not written their share"
    assert steps == ALL
    assert newest(Storage(place)) is None


def test_a_worker_without_space_costs_a_checkpoint_and_no_training(place: str) -> None:
    ended, _, steps = trained(Desk(), Full(place))
    assert ended == f"worker 1: {place}: cannot write 00000001-a1/worker-1.safetensors: No space left on device"
    assert steps == ALL
    assert newest(Storage(place)) is None


class TwoActs(SyncRule):
    """Rounds on one channel, and then on another."""

    name: ClassVar[str] = ""

    async def run(self, peer: Peer) -> None:
        for channel, rounds in (("first", 5), ("second", 40)):
            for _ in range(rounds):
                await peer.train(3)
                await agreed_mean(peer, peer.params, Float32(), channel=channel)


def test_a_channel_that_is_over_costs_one_checkpoint_and_not_the_next(place: str) -> None:
    """The first act has had more rounds when both are ordered, and there will be no other."""
    storage, ended = Storage(place), []

    async def beside(peers: dict[int, Peer]) -> None:
        desk, archive = Desk(), Archive(storage, "a1", keep=2)
        archive.claim(resume=False)
        for peer in peers.values():
            peer.spawn(keep(peer, desk, storage, here, writing_s=1.0))
        while any(peer.rounds_settled.get("first") != 5 for peer in peers.values()):
            await asyncio.sleep(0.01)
        for _ in range(2):
            try:
                folder, _ = await make_checkpoint(desk, archive, list(peers), here, run={}, timeout_s=1.0)
                ended.append(folder)
            except Abandoned as error:
                ended.append(str(error))

    lives = live(run_of(TwoActs(), steps=135), beside=beside)
    waited = "it was not written within 1 s: for workers [0, 1, 2] round 6 of 'first' has not come"
    assert ended == [waited, "00000001-a1"]
    assert all(not peer.keepers for peer in lives.peers.values())
    found = newest(storage)
    assert found is not None
    assert {each.rounds["second"] for each in found.manifest.workers.values()} < set(range(1, 40))


def test_what_an_abandoned_one_left_goes_with_the_next_that_is_whole(place: str) -> None:
    trained(Silent(), Storage(place))
    storage = Storage(place)
    left = {name for name in storage.sizes() if name.startswith("00000001")}
    assert left
    archive = Archive(storage, "a1", keep=2)
    assert archive.next_folder() == "00000002-a1"

    async def beside(peers: dict[int, Peer]) -> None:
        desk = Desk()
        for peer in peers.values():
            peer.spawn(keep(peer, desk, storage, here))
        while any(not peer.rounds_settled for peer in peers.values()):
            await asyncio.sleep(0.01)
        await make_checkpoint(desk, archive, list(peers), here, run={}, timeout_s=100)

    live(run_of(LocalSGD(period=3)), beside=beside)
    assert {name.split("/")[0] for name in storage.sizes()} == {"00000002-a1", "owner.json"}
    found = newest(storage)
    assert found is not None
    assert load(storage, found, 0).step == found.manifest.step
