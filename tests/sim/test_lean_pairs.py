"""Exchanges of pairs whose times are known at once: when they are, and that nobody can tell the difference."""

from __future__ import annotations

import random
from typing import Any

import pytest
from lean_runs import by_messages, check_equal, lean, make_run

from decentral.sim import durations
from decentral.sim.lean.lines import Lines
from decentral.sim.lean.pairs import Way, meet
from decentral.sim.simulate import simulate


def draw_run(rng: random.Random) -> dict[str, Any]:
    """Draw a fleet of pairs that overtake each other or do not, with flows that last next to no time or for phases."""
    groups = [{"count": rng.randint(1, 4), "speed": rng.choice([1.0, 0.95, 0.4])} for _ in range(2)]
    groups[1] |= rng.choice([{}, {"site": "home"}, {"up_bps": 1e5}])
    return {
        "steps": 60,
        "task": {"name": "quadratic", "dimension": rng.choice([16, 4096, 50_000])},
        "fleet": {
            "workers": groups,
            "jitter": rng.choice([0.0, 0.05, 0.5]),
            "network": {"links": [{"latency_s": rng.choice([0.0, 0.001, 0.2])}]},
            "step_time_s": rng.choice([0.01, 1.0]),
        },
        "patience_s": 1e5,
    }


@pytest.mark.parametrize("seed", range(60))
def test_every_record_is_the_one_of_messages(seed: int) -> None:
    rng = random.Random(seed)
    rule = {"name": rng.choice(["noloco", "gossip"]), "period": rng.choice([1, 4, 25])}
    run = make_run(rule, seed=seed, **draw_run(rng))
    check_equal(lean(run), by_messages(run))


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_workers_whom_nobody_else_meets_send_no_flow(jitter: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lines: Lines, flow: object) -> None:
        raise AssertionError("a flow")

    run = make_run({"name": "noloco", "period": 50}, steps=500, fleet={"workers": [{"count": 10}], "jitter": jitter})
    expected = by_messages(run)
    monkeypatch.setattr(Lines, "send", fail)
    check_equal(lean(run), expected)


def test_a_phase_shorter_than_hardly_any_takes_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run({"name": "noloco", "period": 1}, fleet={"workers": [{"count": 6}], "jitter": 0.5})
    expected = by_messages(run)
    monkeypatch.setattr(durations, "FAR", 0.0)  # every other step is shorter than the median
    outcome = simulate(run, timing_only=True)
    assert outcome.records == expected.records


def test_a_verdict_that_overtakes_its_contribution_takes_half_of_the_way() -> None:
    one = Way(begins_at=0.0, contribution_bits=10.0, verdict_bits=1.0, bps=10.0, latency_s=1.0)
    other = Way(begins_at=5.0, contribution_bits=20.0, verdict_bits=1.0, bps=10.0, latency_s=1.0)
    meeting = meet(one, other)
    assert meeting.one_came == 2.0
    # From 5 s on both of the other's go half as fast, the verdict for 0.2 s; then 19 bits of the contribution are left.
    assert meeting.other_heard == 5.0
    assert meeting.other_told == pytest.approx(6.2)
    assert meeting.one_heard == pytest.approx(5.2 + 1.9 + 1.0)
    assert meeting.one_ended == meeting.one_heard
    assert meeting.other_ended == meeting.over == pytest.approx(8.1 + 0.1 + 1.0)
