"""A2CiD2 (arXiv 2306.08289): meetings along Poisson clocks keep the means, and momentum helps on rings."""

from __future__ import annotations

import math
import random

import pytest
import torch
from cluster import STILL, apart, cluster, crash, quadratic, replicas, spread, start_of
from torch import Tensor

from decentral.errors import ConfigError
from decentral.journal import Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import A2CiD2, All, Codec, Float32, Int8, RandomGroups, Ring
from decentral.protocols.codecs import SignMagnitude
from decentral.replica import seed_of
from decentral.sim.simulate import simulate


def start(workers: int) -> Tensor:
    return torch.stack([start_of(worker, 16) for worker in range(workers)])


def meetings(outcome: Outcome) -> list[tuple[float, tuple[int, ...], int]]:
    """Return (logical time, pair, round) of every meeting that took place, in order; each edge of a ring rings twice
    in four local phases."""
    found = {
        (record.members, record.round)
        for record in outcome.records
        if isinstance(record, Synced) and record.channel.startswith("edge") and record.outcome == "committed"
    }
    timed = []
    for pair in {pair for pair, _ in found}:
        name, time = f"edge {pair[0]}-{pair[1]}", 0.0
        for round_ in range(1, 1 + max(round_ for other, round_ in found if other == pair)):
            time += random.Random(seed_of(0, name, round_)).expovariate(0.5)
            if (pair, round_) in found:
                timed.append((time, pair, round_))
    return sorted(timed)


@pytest.mark.parametrize("latency_s", [0.0, 0.03])
def test_it_equals_the_equations(latency_s: float) -> None:
    """x + y, which the continuous part leaves alone, of every worker; also where packets come late."""
    outcome = simulate(cluster(apart(A2CiD2()), 5, 40, task=STILL, latency_s=latency_s))
    events = meetings(outcome)
    assert len(events) > 40
    slow = 1 / (1 - math.cos(2 * math.pi / 5))
    resistance = 0.5 * 2 * 4 / 5
    eta, a = 1 / (2 * math.sqrt(slow * resistance)), math.sqrt(slow / resistance) / 2
    x, now = start(5).double(), 0.0
    y = x.clone()
    for time, (i, j), _ in events:
        e = math.exp(-2 * eta * (time - now))
        x, y, now = ((1 + e) * x + (1 - e) * y) / 2, ((1 - e) * x + (1 + e) * y) / 2, time
        gap = x[i] - x[j]
        x[i], x[j] = x[i] - gap / 2, x[j] + gap / 2
        y[i], y[j] = y[i] - a * gap, y[j] + a * gap
    found = torch.stack([slots["model"] + slots["buffer"] for slots in outcome.slots.values()]).double()
    assert torch.allclose(found, x + y, rtol=0, atol=2e-5)
    assert torch.allclose(x.mean(dim=0), start(5).double().mean(dim=0), atol=1e-12)


def test_it_equals_the_equations_with_local_steps() -> None:
    """Unequal workers on a ring of four, in order of what happens: a phase begins, a phase ends, a meeting."""
    wires = {"latency_s": 0.0, "up_bps": 1e12, "down_bps": 1e12}
    run = cluster(apart(A2CiD2(period=3)), steps=24, speeds=[1, 0.6, 0.8, 0.9], **wires)
    outcome = simulate(run)
    task = quadratic(run)
    shrink = (1 - 0.1 * task.curvatures().double()) ** 3 - 1
    ends = {w: [r.time_s for r in outcome.records if isinstance(r, Trained) and r.worker == w] for w in range(4)}
    begins = {r.worker: r.time_s for r in outcome.records if isinstance(r, Synced) and r.channel == "clock"}
    unit = sum(times[0] for times in ends.values()) / 4
    events = [(begins[pair[0]] + unit * time, "meet", pair) for time, pair, _ in meetings(outcome)]
    for worker, times in ends.items():
        events += [(time, "end", (worker,)) for time in times]
        events += [(time + 1e-9, "begin", (worker,)) for time in [-1e-9, begins[worker], *times[1:]]]
    slow, resistance = 1.0, 0.5 * 2 * 3 / 4
    eta, a = 1 / (2 * math.sqrt(slow * resistance)), math.sqrt(slow / resistance) / 2
    x, since = start(4).double(), [0.0] * 4
    y, read = x.clone(), x.clone()
    for time, kind, who in sorted(events):
        for i in who:
            if kind != "end" and time > begins[i]:
                now = (time - begins[i]) / unit
                e = math.exp(-2 * eta * (now - since[i]))
                x[i], y[i] = ((1 + e) * x[i] + (1 - e) * y[i]) / 2, ((1 - e) * x[i] + (1 + e) * y[i]) / 2
                since[i] = now
        if kind == "begin":
            read[who[0]] = x[who[0]]
        elif kind == "end":
            drift = shrink * (read[who[0]] - task.centre(who[0]))
            x[who[0]] += drift
            y[who[0]] += drift
        else:
            gap = x[who[0]] - x[who[1]]
            for i, sign in zip(who, (1, -1), strict=True):
                x[i] -= sign * gap / 2
                y[i] -= sign * a * gap
    found = torch.stack([slots["model"] + slots["buffer"] for slots in outcome.slots.values()]).double()
    assert torch.allclose(found, x + y, rtol=0, atol=1e-4)


def test_with_eta_zero_it_is_plain_pairwise_gossip() -> None:
    outcome = simulate(cluster(apart(A2CiD2(eta=0.0)), 6, 30, task=STILL))
    x = start(6).double()
    for _, pair, _ in meetings(outcome):
        x[list(pair)] = x[list(pair)].mean(dim=0)
    assert torch.allclose(replicas(outcome).double(), x, rtol=0, atol=2e-6)
    assert torch.allclose(replicas(outcome).mean(dim=0), start(6).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("codec", [Float32(), Int8(), SignMagnitude()])
def test_means_are_kept_whatever_the_codec_loses(codec: Codec) -> None:
    options = {"speeds": [1, 0.5, 0.8, 0.3], "jitter": 0.4}
    outcome = simulate(cluster(apart(A2CiD2(codec=codec)), steps=30, task=STILL, **options))
    sums = torch.stack([slots["model"] + slots["buffer"] for slots in outcome.slots.values()])
    assert torch.allclose(sums.mean(dim=0), 2 * start(4).mean(dim=0), atol=1e-5)


def test_momentum_helps_on_a_ring() -> None:
    def left(eta: float | None) -> float:
        rule = A2CiD2(eta=eta)
        return spread(replicas(simulate(cluster(apart(rule), 16, 40, task=STILL, latency_s=0.0)))).item()

    assert left(None) < 0.5 * left(0.0)


def test_the_averages_rate_is_what_was_asked_for() -> None:
    outcome = simulate(cluster(A2CiD2(rate=2.0, topology=All()), 6, 100, task=STILL, latency_s=0.0))
    seconds = max(record.time_s for record in outcome.records if isinstance(record, Trained))
    met = sum(
        isinstance(r, Synced) and r.channel.startswith("edge") and r.outcome == "committed" for r in outcome.records
    )
    expected = 2.0 * 6 / 2 * (seconds / 0.05 - 1)
    assert abs(met / 2 - expected) < 4 * math.sqrt(expected)


def test_a_slow_worker_holds_nobody_up_and_is_met_to_its_end() -> None:
    outcome = simulate(cluster(A2CiD2(), steps=30, speeds=[1, 0.1, 1], latency_s=0.001))
    trained = [record for record in outcome.records if isinstance(record, Trained)]
    first = max(record.time_s for record in trained if record.step == 1)
    for worker in (0, 2):
        times = [record.time_s for record in trained if record.worker == worker and record.step > 1]
        assert times[-1] < first + 30 * 0.05 + 0.1
    last = max(record.time_s for record in outcome.records if isinstance(record, Synced))
    assert last > 0.8 * 30 * 0.5


def test_it_descends() -> None:
    run = cluster(A2CiD2(rate=2.0), 4, 80)
    outcome = simulate(run)
    task = quadratic(run)
    before, after = (task.start - task.optimum(4)).norm(), (replicas(outcome).mean(dim=0) - task.optimum(4)).norm()
    assert after < 0.3 * before


def test_a_death_leaves_a_path_that_goes_on() -> None:
    outcome = simulate(cluster(A2CiD2(), 5, 40, task=STILL, events=[crash(0.7, 2)], detection_s=0.2))
    assert sorted(outcome.params) == [0, 1, 3, 4]
    end = max(record.time_s for record in outcome.records if isinstance(record, Trained))
    said = [record for record in outcome.records if isinstance(record, Synced) and 1.2 < record.time_s < end]
    assert {record.outcome for record in said} == {"committed"}
    assert outcome.seconds < 5


def test_it_needs_a_graph_that_stays() -> None:
    with pytest.raises(ConfigError, match=r"another graph in every round"):
        A2CiD2(topology=RandomGroups()).check(4)
    A2CiD2(topology=Ring()).check(4)
