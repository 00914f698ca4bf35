"""What workers bring to a round: weights, refusals, usual norms, merges, and codecs that remember."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from cluster import cluster, drive, replicas, rounds, scripted, start_of
from torch import Tensor

from decentral.config import validated
from decentral.errors import ConfigError
from decentral.journal import Refused
from decentral.outcome import Outcome
from decentral.peer import Mailbox, Peer
from decentral.protocols import DDP, All, DiLoCo, Float32, Gossip, Int8, LocalSGD, NoLoCo, OuterSGD
from decentral.protocols.codecs import EF21, Codec, ErrorFeedback
from decentral.protocols.collectives import AllReduce
from decentral.protocols.gossip import mix
from decentral.protocols.merge import Merge
from decentral.protocols.rounds import Round, require_reducible
from decentral.sim.simulate import simulate
from decentral.wire import FrameError, Packet, Tag, signal

both_folding = pytest.mark.parametrize("all_reduce", ["butterfly", "gather"])


def refusals(outcome: Outcome) -> set[tuple[int, int, str]]:
    """Return who refused whom, and why."""
    return {(record.worker, record.source, record.code) for record in outcome.records if isinstance(record, Refused)}


class Middle(Merge):
    """The middle worker's contribution, whatever the others say."""

    centered = True

    def merge(self, contributions: list[Tensor], center: Tensor | None) -> Tensor:  # type: ignore[override]
        assert center is not None
        return contributions[len(contributions) // 2] + center


# -- weights -----------------------------------------------------------------------------------------------------------


@both_folding
def test_a_weighted_mean_is_weighted_by_what_each_says(all_reduce: AllReduce) -> None:
    async def script(peer: Peer) -> Tensor:
        round_ = Round(peer, Float32(), all_reduce)
        round_.contribute(start_of(peer.id, 40), weight=1 + 2 * peer.id)
        means = await round_.settle()
        assert means is not None
        return means[0]

    expected = sum((1 + 2 * worker) * start_of(worker, 40).double() for worker in range(3)) / (1 + 3 + 5)
    for mean in drive(script, 3).values():
        assert torch.allclose(mean.double(), expected, atol=1e-6)  # type: ignore[arg-type]


@both_folding
def test_equal_weights_are_the_plain_mean_to_the_bit(all_reduce: AllReduce) -> None:
    async def script(peer: Peer) -> list[Tensor]:
        means = []
        for weight in (1, 7):
            round_ = Round(peer, Float32(), all_reduce)
            round_.contribute(start_of(peer.id, 40), weight=weight)
            means += await round_.settle() or []
        return means

    for first, second in drive(script, 3).values():
        assert torch.equal(first, second)


# -- refusal -----------------------------------------------------------------------------------------------------------


@both_folding
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_contribution_that_is_not_finite_is_left_out_and_the_round_goes_on(all_reduce: AllReduce, bad: float) -> None:
    async def script(peer: Peer) -> tuple[Tensor | None, float]:
        values = torch.full((9,), bad if peer.id == 1 else float(peer.id))
        round_ = Round(peer, Float32(), all_reduce)
        round_.contribute(values)
        means = await round_.settle()
        return (means[0] if means else None), peer.now()

    rule, results = scripted(script)
    outcome = simulate(cluster(rule, 4))
    for mean, seconds in results.values():
        assert torch.equal(mean, torch.full((9,), (0.0 + 2.0 + 3.0) / 3))
        assert seconds < 1.0
    assert refusals(outcome) == {(worker, 1, "not_finite") for worker in range(4)}
    assert [{record.outcome for record in records} for records in rounds(outcome).values()] == [{"committed"}]


def test_nothing_usable_skips_the_round() -> None:
    async def script(peer: Peer) -> list[Tensor] | None:
        round_ = Round(peer, Float32())
        round_.contribute(torch.full((9,), float("nan")))
        return await round_.settle()

    assert set(drive(script, 3).values()) == {None}


def test_a_gossip_partner_that_sends_nan_is_refused_and_named() -> None:
    async def script(peer: Peer) -> None:
        if peer.id == 0:
            peer.params.fill_(float("nan"))
        await mix(peer, All().links(peer, 1), Float32(), 1)

    rule, _results = scripted(script)
    outcome = simulate(cluster(rule, 2))
    assert (1, 0, "not_finite") in refusals(outcome)
    assert torch.isfinite(outcome.params[1]).all()


@both_folding
def test_an_absurd_norm_is_refused_once_it_is_known_what_is_usual(all_reduce: AllReduce) -> None:
    async def script(peer: Peer) -> list[Tensor]:
        peer.norm_limit = 10.0
        means = []
        for number in range(4):
            values = start_of(peer.id, 40, seed=number)
            round_ = Round(peer, Float32(), all_reduce)
            round_.contribute(values * 1e30 if peer.id == 1 and number == 3 else values)
            means += await round_.settle() or []
        return means

    rule, results = scripted(script)
    outcome = simulate(cluster(rule, 2))
    honest = start_of(0, 40, seed=3)
    for means in results.values():
        assert torch.equal(means[3], honest)
        assert torch.allclose(means[2], (start_of(0, 40, 2) + start_of(1, 40, 2)) / 2, atol=1e-6)
    assert refusals(outcome) == {(0, 1, "norm"), (1, 1, "norm")}


@both_folding
def test_without_a_limit_no_norm_is_absurd(all_reduce: AllReduce) -> None:
    async def script(peer: Peer) -> float:
        peer.norm_limit = 0.0
        round_ = Round(peer, Float32(), all_reduce)
        round_.contribute(torch.full((8,), 4e30 if peer.id == 3 else 0.0))
        means = await round_.settle()
        assert means is not None
        return means[0][0].item()

    assert list(drive(script, 4).values()) == [pytest.approx(1e30)] * 4


def test_norms_may_grow_and_shrink_slowly() -> None:
    """Warm-up makes updates grow a hundredfold, decay makes them shrink: neither is absurd."""

    async def script(peer: Peer) -> int:
        peer.norm_limit = 10.0
        for number in range(40):
            scale = 1.3 ** min(number, 40 - number)
            round_ = Round(peer, Float32(), "gather")
            round_.contribute(start_of(peer.id, 40, seed=number) * scale)
            assert await round_.settle() is not None
        return 1

    rule, _results = scripted(script)
    assert not refusals(simulate(cluster(rule, 3)))


@both_folding
def test_a_norm_that_all_have_come_to_at_once_is_no_absurd_one(all_reduce: AllReduce) -> None:
    """As when gradients that had vanished are back: or no round would be committed any more. One alone is absurd."""

    async def script(peer: Peer) -> list[Tensor]:
        peer.norm_limit = 10.0
        means = []
        for number in range(20):
            values = start_of(peer.id, 40, seed=number) * (1.0 if number < 18 else 1e6)
            round_ = Round(peer, Float32(), all_reduce)
            round_.contribute(values * 1e6 if peer.id == 1 and number == 19 else values)
            means += await round_.settle() or []
        return means

    rule, results = scripted(script)
    outcome = simulate(cluster(rule, 3))
    for means in results.values():
        assert len(means) == 20
        assert torch.allclose(means[18], sum(start_of(worker, 40, 18) for worker in range(3)) / 3 * 1e6)
        assert torch.allclose(means[19], sum(start_of(worker, 40, 19) for worker in (0, 2)) / 2 * 1e6)
    assert refusals(outcome) == {(folder, 1, "norm") for folder in range(3)}


# -- merges ------------------------------------------------------------------------------------------------------------


def test_a_merge_of_the_users_own_decides_what_a_round_comes_to() -> None:
    """Its center is what the round before came to."""
    rule = LocalSGD(period=1, merge=Middle(), all_reduce="gather")
    outcome = simulate(cluster(rule, 3, 2))
    assert torch.equal(outcome.params[0], outcome.params[2])
    expected = simulate(cluster(LocalSGD(period=1, merge=Middle(), all_reduce="gather"), 3, 1))
    first = expected.slots[0]["sync.0.center"]
    assert torch.count_nonzero(first) > 0
    assert torch.equal(first, expected.slots[2]["sync.0.center"])


# -- codecs that remember ----------------------------------------------------------------------------------------------


class Coarse(Int8):
    """Rounds to whole numbers: most of what it gets is lost."""

    def pack(self, values: Tensor, payload: Tensor) -> None:
        super().pack(values.round(), payload)


def inputs(worker: int) -> Iterator[Tensor]:
    return (0.4 * start_of(worker, 32, seed=number) for number in count())


@both_folding
def test_error_feedback_delivers_all_that_was_handed_in_but_the_residual(all_reduce: AllReduce) -> None:
    async def script(peer: Peer) -> tuple[Tensor, Tensor, Tensor]:
        peer.norm_limit = 0.0
        handed_in, used = torch.zeros(32), torch.zeros(32)
        codec = ErrorFeedback(codec=Int8(block=8))
        values = inputs(peer.id)
        for _ in range(12):
            update = next(values)
            round_ = Round(peer, codec, all_reduce)
            round_.contribute(update)
            means = await round_.settle()
            assert means is not None
            handed_in, used = handed_in + update, used + means[0]
        return handed_in, used, peer.slots["sync.0.residual"]

    results = drive(script, 3).values()
    handed_in = torch.stack([item[0] for item in results]).mean(dim=0)
    residual = torch.stack([item[2] for item in results]).mean(dim=0)
    used = next(iter(results))[1]
    slack = 1e-5 if all_reduce == "gather" else 0.05  # the butterfly encodes the mean once more, for good
    assert torch.allclose(used + residual, handed_in, atol=slack)


def test_a_skipped_round_is_undone_or_kept_as_the_caller_says() -> None:
    async def script(peer: Peer) -> tuple[Tensor, Tensor]:
        codec = ErrorFeedback(codec=Coarse())
        kept = []
        for cumulative in (True, False):
            values = torch.full((8,), float("nan")) if peer.id == 1 else torch.full((8,), 0.3)
            channel = f"cumulative {cumulative}"
            round_ = Round(peer, codec, "gather", channel, cumulative=cumulative)
            if peer.id == 0:
                round_.contribute(values)
            else:
                round_.contribute(values[:5])  # nobody agrees on what was staged
            assert await round_.settle() is None
            kept.append(peer.slots.get(f"{channel}.0.residual", torch.zeros(8)).clone())
        return kept[0], kept[1]

    undone, kept = drive(script, 2)[0]
    assert torch.equal(undone, torch.zeros(8))
    assert torch.equal(kept, torch.full((8,), 0.3))


def test_a_codec_with_memory_trains_as_well_as_none_where_the_codec_alone_does_not() -> None:
    def final(codec: Codec) -> Tensor:
        rule = DiLoCo(period=2, outer=OuterSGD(), codec=codec, all_reduce="gather")
        return replicas(simulate(cluster(rule, 3, 60)))

    exact, alone = final(Float32()), final(Coarse(block=64))
    fed = final(ErrorFeedback(codec=Coarse(block=64)))
    assert (fed - exact).norm() < 0.5 * (alone - exact).norm()


# -- impossible combinations -------------------------------------------------------------------------------------------


class Sparse(Int8):
    """Something that leaves most of a vector out."""

    loss = "contractive"


@pytest.mark.parametrize(
    ("codec", "all_reduce", "merge", "message"),
    [
        (Float32(), "butterfly", Middle(), "trusts nobody's arithmetic"),
        (Sparse(), "butterfly", None, "leaves most of a vector out"),
        (ErrorFeedback(codec=Sparse()), "ring", None, "leaves most of a vector out"),
        (ErrorFeedback(codec=Int8()), "ring", None, "must know what others heard of it"),
    ],
)
def test_what_cannot_work_is_refused(codec: Codec, all_reduce: AllReduce, merge: Merge | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_reducible(codec, all_reduce, merge or LocalSGD().merge)


@pytest.mark.parametrize("rule", [Gossip(codec=Sparse()), NoLoCo(codec=ErrorFeedback(codec=Int8()))])
def test_parameters_must_arrive_whole(rule: Gossip | NoLoCo) -> None:
    with pytest.raises(ConfigError, match="is for updates, and this rule sends parameters"):
        rule.check(4)


def test_it_is_refused_when_the_run_file_is_read() -> None:
    with pytest.raises(
        ConfigError, match=r"run\.toml: rule\.all_reduce: with codec .* set it to 'butterfly' or 'gather'"
    ):
        validated(
            {"rule": {"name": "diloco", "codec": {"name": "error_feedback", "codec": "int8"}, "all_reduce": "tree"}},
            "run.toml",
        )


def test_a_merge_of_whole_updates_does_not_take_buckets() -> None:
    class Whole(Middle):
        whole = True

    with pytest.raises(ConfigError, match="judges whole updates"):
        DDP(merge=Whole(), all_reduce="gather").check(4)
    DDP(merge=Whole(), all_reduce="gather", buckets="whole").check(4)  # type: ignore[arg-type]


# -- the mailbox -------------------------------------------------------------------------------------------------------


def packet(nbytes: int = 10) -> Packet:
    return Packet("float32", nbytes, nbytes, torch.zeros(nbytes, dtype=torch.uint8))


def refused(mail: Mailbox, source: int, tag: Tag, what: Packet) -> str:
    with pytest.raises(FrameError) as caught:
        mail.put(source, tag, what)
    return caught.value.code


@pytest.fixture
def mail() -> Iterator[Mailbox]:
    loop = asyncio.new_event_loop()
    yield Mailbox(loop, limit=35)
    loop.close()


def test_the_same_name_twice_is_refused_until_the_first_is_taken(mail: Mailbox) -> None:
    tag = Tag("sync", 1)
    mail.put(1, tag, packet())
    mail.put(2, tag, packet())
    assert refused(mail, 1, tag, packet()) == "duplicate"
    assert mail.take(1, tag) is not None
    mail.put(1, tag, packet())


def test_a_round_that_is_over_takes_no_more_packets(mail: Mailbox) -> None:
    mail.close("sync", 3)
    assert refused(mail, 1, Tag("sync", 3), packet()) == "stale"
    mail.put(1, Tag("sync", 3), signal("no"))
    assert mail.take(1, Tag("sync", 3)) is None
    mail.put(1, Tag("sync", 4), packet())


def test_nobody_fills_our_memory(mail: Mailbox) -> None:
    for round_ in (1, 2, 3):
        mail.put(1, Tag("sync", round_), packet())
    assert refused(mail, 1, Tag("sync", 4), packet()) == "unclaimed"
    mail.put(2, Tag("sync", 4), packet())
    mail.close("sync", 1)
    mail.put(1, Tag("sync", 4), packet())
    assert refused(mail, 1, Tag("sync", 5), packet()) == "unclaimed"
    assert mail.take(1, Tag("sync", 2)) is not None
    mail.put(1, Tag("sync", 5), packet())


def test_a_round_that_nobody_can_have_come_to_is_refused() -> None:
    async def script(peer: Peer) -> None:
        await peer.train(1)
        if peer.id == 0:
            await peer.send(1, Tag("sync", 1_000_000), Float32().encode(torch.zeros(4)))
        await asyncio.sleep(1.0)

    rule, _results = scripted(script)
    assert refusals(simulate(cluster(rule, 2, 5))) == {(1, 0, "future")}


def test_mirrors_of_everybody_need_everybody() -> None:
    """EF21's common mirror is the mean of all workers' own ones: a round that lacks one of them is none."""

    async def script(peer: Peer) -> list[bool]:
        done = []
        for number in range(3):
            values = start_of(peer.id, 32, seed=number)
            if peer.id == 1 and number == 1:
                values[0] = float("nan")
            round_ = Round(peer, EF21(codec="topk"), "gather")  # type: ignore[arg-type]
            round_.contribute(values)
            done.append(await round_.settle() is not None)
        return done

    rule, results = scripted(script)
    outcome = simulate(cluster(rule, 3))
    assert list(results.values()) == [[True, False, True]] * 3
    assert {source for _worker, source, _code in refusals(outcome)} == {1}
    with pytest.raises(ConfigError, match="must hear each other one's change"):
        require_reducible(EF21(codec="topk"), "butterfly", LocalSGD().merge)  # type: ignore[arg-type]
