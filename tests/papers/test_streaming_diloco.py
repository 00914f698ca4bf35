"""Streaming DiLoCo (arXiv 2501.18512): its schedule, its equations on plain tensors, and DiLoCo as a special case."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, drive, outcomes, quadratic, replicas, rounds, short, watched
from pydantic import ValidationError
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.inner import SGD, AdamW, Inner
from decentral.journal import Left, Synced
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import DiLoCo, Float32, Int8, Nesterov, OuterSGD, StreamingDiLoCo, Whole
from decentral.protocols.codecs import E3M0
from decentral.protocols.fragments import Cut, Fragment
from decentral.protocols.schedule import Every
from decentral.protocols.staggered import Staggered
from decentral.sim.simulate import simulate
from decentral.state import Layout

EXACT: dict[str, Any] = {"codec": Float32(), "all_reduce": "butterfly"}
BIG = {"name": "quadratic", "dimension": 6000}


class Strides(Cut):
    """Fragments of every `count`-th twelfth of the vector, wherever tensors begin."""

    count: int = 3

    def split(self, layout: Layout) -> list[Fragment]:
        edges = [layout.size * part // 12 for part in range(13)]
        spans = list(itertools.pairwise(edges))
        return [Fragment(tuple(spans[index :: self.count])) for index in range(self.count)]


def reference(run: Run, rule: StreamingDiLoCo, offsets: list[int], period: int, eta: float, mu: float) -> Tensor:
    """Algorithm 2 step by step on plain float64 tensors; returns the global model after the closing rounds."""
    task = quadratic(run)
    curvature = task.curvatures().double()
    centres = [task.centre(worker).double() for worker in range(run.fleet.size)]
    anchor = torch.full((task.dimension,), task.start, dtype=torch.float64)
    momentum = torch.zeros_like(anchor)
    theta = [anchor.clone() for _ in centres]
    owner = torch.zeros(task.dimension, dtype=torch.long)
    edges = [task.dimension * part // 12 for part in range(13)]
    for part in range(12):
        owner[edges[part] : edges[part + 1]] = part % len(offsets)
    flights: dict[int, tuple[int, Tensor]] = {}
    sent: dict[int, int] = {}

    def send(p: int, t: int) -> None:
        flights[p] = (t, sum(anchor[owner == p] - x[owner == p] for x in theta) / len(theta))
        sent[p] = t

    def land(p: int, alpha: float) -> None:
        mine, mean = owner == p, flights.pop(p)[1]
        momentum[mine] = mu * momentum[mine] + mean
        anchor[mine] -= eta * (mean + mu * momentum[mine])
        for x in theta:
            x[mine] = alpha * x[mine] + (1 - alpha) * anchor[mine]

    for t in range(1, run.steps + 1):
        theta = [x - run.inner.lr * curvature * (x - c) for x, c in zip(theta, centres, strict=True)]
        for p, offset in enumerate(offsets):
            if t >= period + offset and (t - offset) % period == 0:
                send(p, t)
        for p in [p for p in flights if flights[p][0] + rule.overlap <= t]:
            land(p, rule.alpha)
    for p in list(flights):
        land(p, rule.alpha)
    for p in [p for p in range(len(offsets)) if sent.get(p) != run.steps]:
        send(p, run.steps)
        land(p, 0.0)
    return anchor


@pytest.mark.parametrize(
    ("count", "period", "offsets", "overlap", "alpha", "steps"),
    [
        (3, 6, [0, 2, 4], 1, 0.5, 31),
        (3, 7, [0, 2, 4], 0, 0.0, 28),
        (2, 5, [0, 2], 3, 0.25, 29),
        (4, 4, [0, 1, 2, 3], 2, 0.0, 22),
        (1, 6, [0], 4, 0.5, 24),
        (4, 2, [0, 1, 2, 3], 1, 0.5, 17),  # more fragments than steps: the cycle has four
    ],
)
def test_streaming_equals_the_reference(
    count: int, period: int, offsets: list[int], overlap: int, alpha: float, steps: int
) -> None:
    rule = StreamingDiLoCo(period=period, fragments=Strides(count=count), overlap=overlap, alpha=alpha, **EXACT)
    run = cluster(rule, 3, steps, task={"name": "quadratic", "dimension": 30})
    outcome = simulate(run)
    assert all_equal(outcome)
    expected = reference(run, rule, offsets, max(period, count), eta=0.4, mu=0.9)
    assert torch.allclose(outcome.params[0].double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("inner", [SGD(lr=0.1), AdamW(lr=0.05)], ids=short)
@pytest.mark.parametrize("codec", [Float32(), Int8()], ids=short)
@pytest.mark.parametrize("steps", [12, 14, 3])
def test_one_fragment_without_overlap_is_diloco_bit_for_bit(inner: Inner, codec: Float32 | Int8, steps: int) -> None:
    streaming = StreamingDiLoCo(period=4, fragments=Whole(), overlap=0, alpha=0.0, codec=codec, all_reduce="butterfly")
    diloco = DiLoCo(period=4, outer=Nesterov(lr=0.4), codec=codec)
    one, other = (simulate(cluster(rule, 3, steps, task=NET, inner=inner)) for rule in (streaming, diloco))
    assert torch.equal(replicas(one), replicas(other))
    assert torch.equal(one.slots[0]["momentum"], other.slots[0]["momentum"])


def test_fragments_of_one_model_train_as_the_whole_when_they_are_sent_together() -> None:
    """With as many steps as a cycle has, each fragment is sent once, at the end, from the same start."""
    rule = StreamingDiLoCo(period=8, fragments=Strides(count=4), outer=OuterSGD(), **EXACT)
    whole = DiLoCo(period=7, outer=OuterSGD())
    one, other = (simulate(cluster(each, 3, 7, task=NET)) for each in (rule, whole))
    assert torch.equal(replicas(one), replicas(other))


def test_alpha_one_never_hears_the_others_until_the_end() -> None:
    class Watching(StreamingDiLoCo):
        async def run(self, peer: Peer) -> None:
            train = peer.train

            async def watched(steps: int) -> int:
                done = await train(steps)
                seen[peer.id] = peer.params.clone()
                return done

            peer.train = watched  # type: ignore[method-assign]
            await super().run(peer)

    seen: dict[int, Tensor] = {}
    run = cluster(Watching(period=3, fragments=Strides(), alpha=1.0, **EXACT), 3, 20)
    outcome = simulate(run)
    for worker in range(3):
        assert torch.allclose(seen[worker], quadratic(run).after_sgd(worker, 0.1, 20), atol=1e-6)
    assert all_equal(outcome)
    assert (outcome.params[0] - quadratic(run).start).abs().max() > 0.1


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_the_papers_example_of_a_schedule() -> None:
    """H = 100 and two fragments: the second is first sent at step 150."""
    schedule = Staggered(2, 100)
    assert [schedule.first(index) for index in (0, 1)] == [100, 150]
    assert {step: schedule.due(step) for step in range(400) if schedule.due(step)} == {
        100: [0],
        150: [1],
        200: [0],
        250: [1],
        300: [0],
        350: [1],
    }


@pytest.mark.parametrize(("count", "period"), [(1, 1), (1, 5), (3, 10), (9, 100), (17, 100), (5, 3)])
def test_every_fragment_is_due_once_in_every_cycle_and_none_is_overlooked(count: int, period: int) -> None:
    schedule = Staggered(count, period)
    cycle = max(count, period)
    due = [index for step in range(2 * cycle, 3 * cycle) for index in schedule.due(step)]
    assert sorted(due) == list(range(count))
    step, visited = 0, set()
    while step < 5 * cycle:
        step += schedule.steps(step)
        visited.add(step)
        assert schedule.due(step)
    assert {step for step in range(5 * cycle) if schedule.due(step)} <= visited
    assert [schedule.first(index) - schedule.first(0) for index in range(count)] == [
        index * max(1, period // count) for index in range(count)
    ]


def test_a_period_is_a_number_or_the_schedule_every() -> None:
    assert StreamingDiLoCo(period=Every(period=7)).period == 7  # type: ignore[arg-type]
    for period, message in ((watched(), "talks at fixed steps"), (0, "greater than or equal to 1")):
        with pytest.raises(ValidationError, match=message):
            StreamingDiLoCo.model_validate({"period": period})


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule.overlap: 4 steps are no less than the 4"):
        StreamingDiLoCo(period=4, overlap=4).check(2)


# -- traffic ----------------------------------------------------------------------------------------------------------


def test_the_peak_falls_and_the_sum_stays() -> None:
    """Each fragment travels once in a cycle; at no time more than the largest of them."""

    def bursts(rule: DiLoCo | StreamingDiLoCo) -> list[int]:
        records = simulate(cluster(rule, 2, 48, task=BIG)).records
        sent = [0, *(r.sent_bytes for r in records if isinstance(r, Synced) and r.worker == 0)]
        return [after - before for before, after in itertools.pairwise(sent)]

    streaming = bursts(StreamingDiLoCo(period=12, fragments=Strides(count=4), **EXACT))
    diloco = bursts(DiLoCo(period=12))
    assert len(streaming) == 3 * 4 + 1 + 3  # three cycles and one fragment more; three were trained on since
    assert max(streaming[:13]) == pytest.approx(max(diloco) / 4, rel=0.1)
    assert sum(streaming[:4]) == pytest.approx(diloco[0], rel=0.1)


def test_overlap_hides_the_transfer() -> None:
    """A fragment's 6,000 bytes take 0.048 s on this link, about a step."""
    options = {"up_bps": 1e6, "down_bps": 1e6, "latency_s": 0.001}

    def seconds(overlap: int) -> float:
        rule = StreamingDiLoCo(period=12, fragments=Strides(count=4), overlap=overlap, **EXACT)
        return simulate(cluster(rule, 2, 48, task=BIG, **options)).seconds  # type: ignore[arg-type]

    closing = 4 * 0.048 + 0.02  # nothing hides the last transfers
    assert seconds(2) < 48 * 0.05 + closing
    assert seconds(0) > 48 * 0.05 + 13 * 0.048


def test_contributions_travel_in_four_bits_and_are_summed_in_float32() -> None:
    """The mean of 1 and 1/4 is no number of E3M0's; a butterfly would send it once more and lose it."""

    async def script(peer: Peer) -> Tensor | None:
        values = torch.tensor([16.0, 1.0 if peer.id == 0 else 0.25, *[0.0] * 6])
        return await StreamingDiLoCo().agreed_mean(peer, values)

    for mean in drive(script, 2).values():
        assert mean[:2].tolist() == [16.0, 0.625]
    plain, packed = (
        simulate(cluster(StreamingDiLoCo(period=5, codec=codec), 2, 20, task=BIG)).left()[0].sent_bytes
        for codec in (Float32(), E3M0())
    )
    assert plain / packed == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("codec", [E3M0(), Int8()], ids=short)
def test_anchors_are_the_same_bits_though_replicas_differ(codec: E3M0 | Int8) -> None:
    rule = StreamingDiLoCo(period=4, fragments=Strides(), codec=codec, overlap=2)
    outcome = simulate(cluster(rule, 3, 31, task=NET, speeds=(1.0, 0.8, 0.7)))
    assert torch.equal(outcome.slots[0]["anchor"], outcome.slots[2]["anchor"])
    assert all_equal(outcome)
    assert outcome.after["loss"] != outcome.before["loss"]


# -- churn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_s", [0.1, 0.22, 0.31, 0.55, 0.9])
def test_survivors_stay_equal(at_s: float) -> None:
    options = {"up_bps": 2e6, "down_bps": 2e6, "detection_s": 0.1}
    rule = StreamingDiLoCo(period=6, fragments=Strides(), overlap=2, **EXACT)
    outcome = simulate(cluster(rule, 4, 24, task=BIG, events=[crash(at_s, 2)], **options))
    assert sorted(outcome.params) == [0, 1, 3]
    assert all_equal(outcome)
    for fragment in range(3):
        said = outcomes(outcome, f"fragment {fragment}")
        assert all(len(of_round) == 1 for of_round in said)
        assert "skipped" not in {next(iter(of_round))[0] for of_round in said}
        assert said[-1] == {("committed", (0, 1, 3))}


@pytest.mark.parametrize("steps", [12, 6])
def test_a_skipped_fragment_round_leaves_the_fragment_alone_and_the_next_delta_spans_both(steps: int) -> None:
    """A round that is skipped after the last step is tried once more."""

    class Late(StreamingDiLoCo):
        async def run(self, peer: Peer) -> None:
            if peer.id == 1:
                await asyncio.sleep(1.5)
            await super().run(peer)

    rule = Late(period=6, fragments=Whole(), overlap=0, alpha=0.0, outer=OuterSGD(), **EXACT)
    run = cluster(rule, 2, steps, patience_s=1.0)
    outcome = simulate(run)
    kinds = [records[0].outcome for records in rounds(outcome, "fragment 0").values()]
    assert kinds == ["skipped", "committed"]
    both = torch.stack([quadratic(run).after_sgd(worker, 0.1, steps) for worker in range(2)]).mean(dim=0)
    assert torch.allclose(outcome.params[0], both, atol=1e-6)


def test_timing_only_tells_the_same_story() -> None:
    rule = StreamingDiLoCo(period=4, fragments=Strides(), overlap=2)
    run = cluster(rule, 3, 20, task=BIG, events=[crash(0.4, 2)], detection_s=0.1)

    def story(outcome: Outcome) -> list[object]:
        return [(r.time_s, r.worker, r.sent_bytes) for r in outcome.records if isinstance(r, (Synced, Left))]

    assert story(simulate(run, timing_only=True)) == story(simulate(run))
