"""M-SGC (arXiv 2211.13802): the gradient of everybody's batches, whoever is late, from little repeated work."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, drive, outcomes, replicas, short
from plain import NOISY, Plain, close
from sockets import train_here
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Trained
from decentral.peer import Peer
from decentral.protocols import MSGC, Int8
from decentral.protocols.codecs import E3M0, Codec
from decentral.protocols.gradient_codes import Job
from decentral.protocols.interleaved_jobs import InterleavedJob, packed, unpacked
from decentral.sim.simulate import simulate

SETTINGS = [(1, 2, 1), (1, 3, 2), (2, 3, 1), (2, 4, 3), (3, 4, 2), (2, 3, 6)]
"""(B, W, lambda), for six workers."""


def m_sgc(burst: int, window: int, stragglers: int) -> MSGC:
    return MSGC(burst=burst, window=window, stragglers=stragglers)


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("burst", "window", "stragglers"), SETTINGS)
def test_the_pieces_of_a_job_are_all_of_it(burst: int, window: int, stragglers: int) -> None:
    pieces = m_sgc(burst, window, stragglers).pieces(6)
    steps = [step for piece in range(pieces.own + pieces.groups) for step in pieces.steps(piece)]
    assert steps == list(range(pieces.span))
    if stragglers < 6:
        unit = 1 / (6 * (burst + (window - 1) * (stragglers + 1)))
        assert 6 * (window - 1) * (stragglers + 1) * unit + burst * 6 * unit == pytest.approx(1)
        assert 1 / (6 * pieces.span) == pytest.approx(unit)


@pytest.mark.parametrize(
    ("burst", "window", "stragglers", "workers", "load"),
    [
        (1, 2, 27, 256, 28 * 2 / (256 * (1 + 28))),
        (1, 3, 2, 6, 3 * 3 / (6 * (1 + 2 * 3))),
        (2, 3, 6, 6, 4 / (6 * 2)),  # as many stragglers as workers: nothing is coded
    ],
)
def test_the_load_is_what_the_paper_says(burst: int, window: int, stragglers: int, workers: int, load: float) -> None:
    assert m_sgc(burst, window, stragglers).load(workers) == pytest.approx(load)


def test_assignments_come_back_as_they_were() -> None:
    for plan in itertools.product([None, 0, 1, 2], repeat=3):
        assert unpacked(packed(17, plan), 3) == (17, list(plan))


# -- jobs -------------------------------------------------------------------------------------------------------------


def obeys(rounds: list[set[int]], burst: int, window: int, stragglers: int) -> bool:
    """Say whether in any window few workers are late, and each of them within few rounds."""
    for start in range(len(rounds)):
        part = rounds[start : start + window]
        late = set().union(*part)
        spans = [[at for at, who in enumerate(part) if worker in who] for worker in late]
        if len(late) > stragglers or any(span[-1] - span[0] >= burst for span in spans):
            return False
    return True


def patterns(seed: int, burst: int, window: int, stragglers: int) -> list[set[int]]:
    """Return who of six workers is late in each of 15 rounds: as many as the model allows, in random order."""
    draw = random.Random(seed)
    rounds: list[set[int]] = [set() for _ in range(15)]
    for at, worker in sorted(itertools.product(range(15), range(6)), key=lambda _: draw.random()):
        rounds[at].add(worker)
        if not obeys(rounds, burst, window, stragglers):
            rounds[at].discard(worker)
    return rounds


class Bench:
    """Six workers on one job, whose gradients are random vectors."""

    def __init__(self, rule: MSGC, peer: Peer) -> None:
        self.rule, self.peer, self.code = rule, peer, rule.code(peer).float()
        self.pieces = rule.pieces(6)
        groups = [Job(peer.cohort, peer.params, rule.code(peer)) for _ in range(self.pieces.groups)]
        self.job = InterleavedJob(peer, self.pieces, 10**6, groups)
        generator = torch.Generator().manual_seed(5)
        self.gradients = torch.randn(6, self.pieces.span, peer.params.numel(), generator=generator)

    def do(self, worker: int, piece: int | None) -> None:
        if piece is not None:
            batches = self.pieces.batches(self.peer.cohort, worker, 1, piece, self.code)
            total = torch.zeros_like(self.peer.params)
            for batch, weight in batches:
                total += weight * self.gradients[batch.worker, batch.step]
            self.job.take(worker, piece, total)

    def work(self, rounds: list[set[int]]) -> Tensor | None:
        """Let everybody work through the job's rounds who is not late; return the mean that comes of it."""
        for slot in range(self.rule.vectors):
            for worker in set(range(6)) - rounds[slot]:
                self.do(worker, self.job.due_in(slot, worker))
        return self.job.mean()

    def right(self, mean: Tensor | None) -> bool:
        return mean is not None and torch.allclose(mean, self.gradients.mean(dim=(0, 1)), atol=1e-5)


def on_bench(check: Any) -> None:
    async def script(peer: Peer) -> None:
        if peer.id == 0:
            check(peer)

    drive(script, 6, steps=1)


@pytest.mark.parametrize(("burst", "window", "stragglers"), SETTINGS)
def test_stragglers_as_the_model_has_them_leave_the_sum_when_it_is_due(
    burst: int, window: int, stragglers: int
) -> None:
    def check(peer: Peer) -> None:
        rule, late = m_sgc(burst, window, stragglers), 0
        for seed in range(6):
            rounds = patterns(seed, burst, window, stragglers)
            late += sum(len(who) for who in rounds)
            for start in range(len(rounds) - rule.delay):
                bench = Bench(rule, peer)
                assert bench.right(bench.work(rounds[start:]))
        assert late > 6

    on_bench(check)


@pytest.mark.parametrize(("burst", "window", "stragglers"), SETTINGS)
def test_other_stragglers_never_make_a_wrong_sum_and_what_lacks_can_be_had(
    burst: int, window: int, stragglers: int
) -> None:
    def check(peer: Peer) -> None:
        draw, rule, lacking = random.Random(1), m_sgc(burst, window, stragglers), 0
        for _ in range(40):
            bench = Bench(rule, peer)
            rounds = [{worker for worker in range(6) if draw.random() < 0.5} for _ in range(rule.vectors)]
            mean = bench.work(rounds)
            assert mean is None or bench.right(mean)
            lacking += mean is None
            for worker in range(6):
                while (piece := bench.job.wanted(worker, coded=True)) is not None:
                    bench.do(worker, piece)
            assert bench.right(bench.job.mean())
        assert lacking > 20

    on_bench(check)


# -- the rule ---------------------------------------------------------------------------------------------------------


def delayed_descent(run: Run, rule: MSGC) -> Tensor:
    """x_(r+1) = x_r - 0.1 grad F_t(x_t), t = r - T, F_t the mean over the job's batches, on float64 tensors."""
    plain, count = Plain(run), run.fleet.size
    span = (rule.window - 1) * (rule.stragglers + 1) + rule.burst if rule.stragglers < count else rule.window - 1
    delay, points = rule.window - 2 + rule.burst, [plain.start()]
    jobs = [range(begin, min(begin + span, run.steps)) for begin in range(0, run.steps, span)]
    for number in range(len(jobs) + delay):
        point, job = points[-1], number - delay
        if job >= 0:
            found = [plain.gradient(worker, step, points[job]) for worker in plain.workers for step in jobs[job]]
            point = point - 0.1 * torch.stack(found).mean(dim=0)
        points.append(point)
    return points[-1]


@pytest.mark.parametrize("speeds", [(1, 1, 1, 1), (1, 0.9, 0.8, 0.3), (0.1, 1, 1, 1), (0.1, 0.1, 0.4, 1)], ids=str)
@pytest.mark.parametrize("setting", [(1, 2, 1), (2, 3, 1), (1, 4, 1), (2, 3, 4)], ids=str)
def test_it_is_delayed_descent_whoever_is_late(setting: tuple[int, int, int], speeds: tuple[float, ...]) -> None:
    rule = m_sgc(*setting)
    run = cluster(rule, steps=23, task=NOISY, speeds=speeds)
    outcome = simulate(run)
    assert all_equal(outcome)
    jobs = -(-23 // rule.pieces(4).span)
    found = [kind for ((kind, _),) in outcomes(outcome, "server 0")]
    assert found == ["skipped"] * rule.delay + ["committed"] * jobs
    assert close(outcome.params[0], delayed_descent(run, rule))
    assert {left.step for left in outcome.left()} == {23}


def test_nothing_but_the_load_takes_time_when_nobody_is_late() -> None:
    rule = m_sgc(1, 3, 1)
    run = cluster(rule, steps=20, latency_s=0.0, up_bps=1e15, down_bps=1e15)
    gradients = rule.load(4) * 4 * 20
    assert simulate(run).seconds == pytest.approx(gradients * run.fleet.step_time_s, rel=1e-6)


def test_a_worker_that_is_late_now_and_then_holds_up_nobody() -> None:
    """Speeds that jitter cost less time than where each round waits for all."""
    run = cluster(m_sgc(1, 2, 2), 6, 30, jitter=1.0)
    waits = cluster(MSGC(burst=1, window=2, stragglers=2, slack=1e3), 6, 30, jitter=1.0)
    assert simulate(run).seconds < simulate(waits).seconds


@pytest.mark.parametrize("speeds", [(1, 1, 1, 0.1), (0.1, 1, 1, 1)], ids=str)
def test_rounds_that_a_worker_has_missed_are_steps_without_samples(speeds: tuple[float, ...]) -> None:
    """The straggler makes up for what the sums lack and for no more."""
    rule = m_sgc(1, 3, 1)
    outcome = simulate(cluster(rule, steps=30, speeds=speeds))
    trained = [record for record in outcome.records if isinstance(record, Trained)]
    samples = [sum(record.samples for record in trained if record.worker == worker) for worker in range(4)]
    missed = 30 - samples.pop(speeds.index(0.1))
    assert samples == [30] * 3
    assert 0 < missed < 30
    assert missed % rule.pieces(4).span == 0  # whole rounds
    assert {left.step for left in outcome.left()} == {30}


def test_both_worlds_come_to_the_same() -> None:
    run = cluster(m_sgc(1, 2, 1), 3, 9, task=NET)
    assert torch.allclose(replicas(train_here(run)), replicas(simulate(run)), atol=1e-6)


def test_the_mean_goes_on_without_who_has_gone_as_far_as_the_code_goes() -> None:
    one = simulate(cluster(m_sgc(1, 2, 1), 4, 30, events=[crash(0.7, 3)]))
    assert all_equal(one)
    found = [kind for ((kind, _),) in outcomes(one, "server 0")]
    assert found == ["skipped"] + ["committed"] * 10
    two = simulate(cluster(m_sgc(1, 2, 1), 4, 30, events=[crash(0.7, 3), crash(0.9, 2)]))
    assert all_equal(two)
    assert [kind for ((kind, _),) in outcomes(two, "server 0")][-1] == "skipped"


@pytest.mark.parametrize("at_s", [0.1, 0.75, 1.1, 1.9])
def test_when_the_server_dies_the_next_one_goes_on(at_s: float) -> None:
    outcome = simulate(cluster(m_sgc(1, 2, 1), 4, 30, events=[crash(at_s, 0)], detection_s=0.5))
    assert sorted(outcome.params) == [1, 2, 3]
    assert all_equal(outcome)
    found = [kind for ((kind, _),) in outcomes(outcome, "server 0") + outcomes(outcome, "server 1")]
    assert 8 <= found.count("committed") <= 10  # of ten jobs, but for those that the dead server had under way
    assert outcome.after["loss"] < 0.75 * outcome.before["loss"]


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_pushes_train_too(codec: Codec) -> None:
    outcome = simulate(cluster(MSGC(window=2, codec=codec), 4, 30))
    assert outcome.after["loss"] < 0.7 * outcome.before["loss"]


def test_time_alone() -> None:
    run = cluster(MSGC(), steps=20, speeds=(1, 0.6, 0.9, 0.3))
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds


@pytest.mark.parametrize(("workers", "steps"), [(1, 7), (3, 1)])
def test_one_worker_is_enough_and_so_is_one_step(workers: int, steps: int) -> None:
    run = cluster(MSGC(), workers, steps, task=NOISY)
    assert close(simulate(run).params[0], delayed_descent(run, MSGC()))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule\.window: with window 8 and burst 2 a push carries 9 vectors"):
        MSGC(window=8, burst=2).check(4)
    with pytest.raises(ConfigError, match=r"rule\.burst: 3 rounds are no less than the window of 3"):
        MSGC(window=3, burst=3).check(4)
