"""Sample leases in simulated runs: the journal's account of every sample, held against what really was computed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from marks import Marks
from test_engine import bits

from decentral.config import Run, validated
from decentral.coverage import Coverage, Repeat
from decentral.errors import ConfigError, VerificationError
from decentral.journal import Leased, Lost, Record, Settled, Trained
from decentral.outcome import Outcome
from decentral.protocols import RULES
from decentral.sim.simulate import simulate


@pytest.fixture(autouse=True)
def asked() -> Iterator[list[tuple[int, int, int]]]:
    """The batches that workers have asked the task for, none at first."""
    Marks.asked.clear()
    yield Marks.asked
    Marks.asked.clear()


def run_of(rule: Any, *events: dict[str, Any], fleet: dict[str, Any] | None = None, **fields: Any) -> Run:
    """Return a run with leases of four workers, two of them slow."""
    machines = {"workers": [{"count": 2}, {"count": 2, "speed": 0.6}], "detection_s": 0.1, "latency_s": 0.01}
    table = {
        "rule": rule,
        "leases": True,
        "steps": 24,
        "batch_size": 4,
        "evaluate_every": 0,
        "patience_s": 5.0,
        "norm_limit": 0.0,
        "task": {"name": "marks:Marks"},
        "inner": {"name": "sgd", "lr": 1.0},
        "fleet": {**machines, "events": list(events), **(fleet or {})},
        "sim": {"processes": 1},
    }
    return validated({**table, **fields}, "test")


def crash(at_s: float, worker: int) -> dict[str, Any]:
    return {"at_s": at_s, "worker": worker}


def join(at_s: float, worker: int) -> dict[str, Any]:
    return {"at_s": at_s, "kind": "join", "worker": worker}


def preempt(at_s: float, worker: int, notice_s: float) -> dict[str, Any]:
    return {"at_s": at_s, "kind": "preempt", "worker": worker, "notice_s": notice_s}


def times_asked(asked: Iterable[tuple[int, int, int]]) -> Counter[int]:
    """Return how often each sample was computed on. All of them must be of the stream that is shared."""
    assert {worker for worker, _, _ in asked} == {0}
    return Counter(index for _, start, size in asked for index in range(start, start + size))


def each(ranges: Iterable[tuple[int, ...]]) -> list[int]:
    return [index for start, stop, *_ in ranges for index in range(start, stop)]


def of(kind: type[Record], outcome: Outcome) -> list[Any]:
    return [record for record in outcome.records if isinstance(record, kind)]


# Every sample is accounted for.

VOTED: dict[str, dict[str, Any]] = {
    "local_sgd": {"name": "local_sgd", "period": 3},
    "diloco": {"name": "diloco", "period": 3, "outer": {"name": "sgd", "lr": 1.0}, "codec": "float32"},
    "ddp": {"name": "ddp"},
}


@pytest.mark.parametrize("rule", VOTED.values(), ids=list(VOTED))
@pytest.mark.parametrize("seed", range(12))
def test_what_is_settled_is_in_the_model_and_what_is_repeated_was_computed_twice(
    rule: dict[str, Any], seed: int, asked: list[tuple[int, int, int]]
) -> None:
    chance = random.Random(seed)
    events = [
        chance.choice([crash, join])(round(chance.uniform(0.0, 2.5), 3), chance.randrange(1, 4))
        for _ in range(chance.randint(1, 7))
    ]
    events.append(preempt(round(chance.uniform(0.0, 2.0), 3), chance.randrange(1, 4), chance.choice([0.05, 1.0])))
    fleet = {"jitter": chance.choice([0, 0.3]), "detection_s": chance.choice([0.02, 0.4]), "up_bps": 1e9}
    outcome = simulate(run_of(rule, *events, fleet=fleet))
    found = outcome.coverage()
    assert_exact(found, outcome, times_asked(asked), torn=len(events) if rule["name"] == "ddp" else 0)
    settled = set(range(found.samples)) - set(each(found.missing))
    assert settled == set(outcome.merged().nonzero().view(-1).tolist())


UNVOTED: dict[str, dict[str, Any]] = {
    "noloco": {"name": "noloco", "period": 3},
    "gossip": {"name": "gossip", "period": 3},
    "async_local_sgd": {"name": "async_local_sgd", "period": 3},
    "fedbuff": {"name": "fedbuff", "period": 3, "buffer": 1},  # what is in a buffer when the run ends is lost
    "ad_psgd": {"name": "ad_psgd", "period": 3},
}


@pytest.mark.parametrize("rule", UNVOTED.values(), ids=list(UNVOTED))
@pytest.mark.parametrize("seed", range(8))
def test_rules_without_votes_account_for_every_sample_too(
    rule: dict[str, Any], seed: int, asked: list[tuple[int, int, int]]
) -> None:
    """One worker dies: two that die together may take with them what they have given each other alone."""
    chance = random.Random(seed)
    outcome = simulate(run_of(rule, crash(round(chance.uniform(0.1, 2.0), 3), chance.randrange(1, 4))))
    found = outcome.coverage()
    assert_exact(found, outcome, times_asked(asked), torn=0)
    assert set(each(found.missing)) | set(outcome.merged().nonzero().view(-1).tolist()) >= set(range(found.samples))


def assert_exact(found: Coverage, outcome: Outcome, times: Counter[int], torn: int) -> None:
    """Assert that the journal agrees with what was computed, but for gradients that so many deaths may have torn up."""
    claimed = sum(record.samples for record in of(Trained, outcome))
    assert 0 <= times.total() - claimed <= 4 * torn
    again = {index: repeat.times for repeat in found.repeated for index in range(repeat.start, repeat.stop)}
    assert again.keys() <= times.keys()
    assert sum(count != again.get(index, 1) for index, count in times.items()) <= 4 * torn
    assert max(times) < found.samples
    settled = set(range(found.samples)) - set(each(found.missing))
    assert settled <= times.keys()
    assert found.consumed == min(each(found.missing), default=found.samples)


def test_a_run_without_losses_consumes_each_sample_once(asked: list[tuple[int, int, int]]) -> None:
    outcome = simulate(run_of({"name": "diloco", "period": 3}))
    assert outcome.coverage() == Coverage(samples=4 * 24 * 4, missing=(), repeated=())
    assert set(times_asked(asked).values()) == {1}


def test_what_a_dead_worker_had_not_settled_is_leased_again() -> None:
    """It dies while round 1 is on the wire: what it has trained on is repeated, what it held besides is not.

    Each worker begins with leases for two phases of 5 x 4 samples: worker 0 has 0 to 39, worker 1 has 40 to 79.
    """
    fleet = {"workers": [{"count": 2}], "up_bps": 1e5, "down_bps": 1e5}
    run = run_of({"name": "diloco", "period": 5}, crash(0.8, 1), fleet=fleet)
    outcome = simulate(run)
    leases = [(record.worker, record.start, record.stop) for record in of(Leased, outcome)]
    assert leases[:2] == [(0, 0, 40), (1, 40, 80)]
    assert leases[2:5] == [(0, 40, 60), (0, 60, 80), (0, 80, 96)]
    found = outcome.coverage()
    assert found.repeated == (Repeat(40, 60, times=2),)
    assert found.missing == ()
    assert found.consumed == found.samples == 24 * 4


# A notice.


@pytest.mark.parametrize("rule", VOTED.values(), ids=list(VOTED))
def test_a_notice_loses_no_sample(rule: dict[str, Any], asked: list[tuple[int, int, int]]) -> None:
    outcome = simulate(run_of(rule, preempt(0.77, 2, notice_s=30.0)))
    left = next(record for record in outcome.left() if record.worker == 2)
    assert left.reason == "preempted"
    assert left.time_s < 3.0
    assert outcome.coverage().missing == outcome.coverage().repeated == ()
    assert set(times_asked(asked).values()) == {1}


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_a_phase_longer_than_the_notice_ends_early_for_all(name: str, asked: list[tuple[int, int, int]]) -> None:
    """Half of the notice for local steps: until 0.8 s, and 10 ms later for those who are called.

    Steps of 1/20 and 1/12 s begin when the leases are here, at 0.02 s; the one at hand is done.
    """
    run = run_of({"name": name, "period": 20}, preempt(0.5, 2, notice_s=0.6), steps=60)
    outcome = simulate(run)
    first = {record.worker: record for record in reversed(of(Trained, outcome))}
    assert {worker: first[worker].steps for worker in range(4)} == {0: 16, 1: 16, 2: 10, 3: 10}
    assert first[2].time_s == pytest.approx(0.02 + 10 / 12)
    left = next(record for record in outcome.left() if record.worker == 2)
    assert left.reason == "preempted"
    assert left.time_s < 1.1
    assert outcome.coverage().missing == outcome.coverage().repeated == ()
    assert set(times_asked(asked).values()) == {1}
    assert {record.steps for record in of(Trained, outcome) if record.time_s > 1.1} >= {20}


def test_a_notice_longer_than_the_phase_changes_no_phase() -> None:
    outcome = simulate(run_of({"name": "diloco", "period": 3}, preempt(0.3, 2, notice_s=2.0)))
    assert {record.steps for record in of(Trained, outcome)} == {3}


def test_a_notice_that_is_too_short_is_a_crash() -> None:
    outcome = simulate(run_of({"name": "diloco", "period": 10}, preempt(0.2, 2, notice_s=0.1)))
    assert next(record for record in outcome.left() if record.worker == 2).reason == "crashed"


# Gradients that nobody used.


def test_the_samples_of_a_skipped_step_are_lost_and_leased_again(asked: list[tuple[int, int, int]]) -> None:
    """A line that is too thin for a while makes rounds be skipped, and their gradients are used by nobody."""
    slow = {"at_s": 0.5, "kind": "link", "worker": 1, "factor": 1e-4, "until_s": 8.0}
    outcome = simulate(run_of({"name": "ddp"}, slow, patience_s=1.0, fleet={"up_bps": 1e7, "down_bps": 1e7}))
    lost = sum(record.samples for record in of(Lost, outcome))
    assert lost > 0
    found = outcome.coverage()
    again = sum((repeat.times - 1) * (repeat.stop - repeat.start) for repeat in found.repeated)
    assert again + len(each(found.missing)) == lost
    kept = set(range(found.samples)) - set(each(found.missing))
    assert kept == set(outcome.merged().nonzero().view(-1).tolist())


# Epochs.


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "ddp", "noloco", "gossip"])
@pytest.mark.parametrize("epoch", [100, 128, 170])
def test_a_run_ends_when_its_epochs_are_used_up(name: str, epoch: int, asked: list[tuple[int, int, int]]) -> None:
    rule = {"name": name} if name == "ddp" else {"name": name, "period": 3}
    task = {"name": "marks:Marks", "epoch": epoch}
    outcome = simulate(run_of(rule, epochs=2, steps=200, task=task))
    whole = -(-2 * epoch // 4) * 4  # the last batch reaches into the third epoch
    assert outcome.coverage() == Coverage(samples=whole, missing=(), repeated=())
    assert times_asked(asked) == Counter(range(whole))
    ends = {record.step for record in outcome.left()}
    assert len(ends) == 1
    assert max(ends) < 200
    if name in ("local_sgd", "diloco", "ddp"):
        assert len({params.numpy().tobytes() for params in outcome.params.values()}) == 1


@pytest.mark.parametrize("seed", range(10))
def test_epochs_end_together_whatever_befalls_the_workers(seed: int) -> None:
    chance = random.Random(seed)
    events = [
        chance.choice([crash, join])(round(chance.uniform(0.0, 3.0), 3), chance.randrange(1, 4)) for _ in range(5)
    ]
    rule = chance.choice([{"name": "diloco", "period": 3}, {"name": "local_sgd", "period": 4}, {"name": "ddp"}])
    task = {"name": "marks:Marks", "epoch": 150}
    outcome = simulate(run_of(rule, *events, epochs=2, steps=400, task=task))
    assert len({params.numpy().tobytes() for params in outcome.params.values()}) == 1
    found = outcome.coverage()
    assert found.samples == 300
    settled = set(range(300)) - set(each(found.missing))
    assert settled == set(outcome.merged().nonzero().view(-1).tolist())


# The same run, whoever computes it.


@pytest.mark.parametrize("rule", [{"name": "diloco", "period": 3}, {"name": "ddp"}, {"name": "noloco", "period": 3}])
def test_leases_do_not_depend_on_the_number_of_processes(rule: dict[str, Any]) -> None:
    events = (crash(0.8, 1), preempt(1.0, 3, 0.2), join(1.4, 1))
    task = {"name": "quadratic", "noise": 0.3}
    one, again, two = (
        bits(simulate(run_of(rule, *events, task=task, inner={"name": "adamw", "lr": 0.01}, sim={"processes": count})))
        for count in (1, 1, 2)
    )
    assert one == again == two


@pytest.mark.parametrize("rule", [{"name": "diloco", "period": 3}, {"name": "ddp"}, {"name": "noloco", "period": 3}])
def test_time_alone_leases_alike(rule: dict[str, Any]) -> None:
    run = run_of(rule, crash(0.8, 1), preempt(1.0, 3, 5.0), join(1.4, 1))

    def of_samples(outcome: Outcome) -> list[str]:
        return [record.to_json() for record in outcome.records if isinstance(record, Leased | Settled | Lost)]

    timing = simulate(run, timing_only=True)
    assert of_samples(timing) == of_samples(simulate(run))
    assert timing.coverage().samples > 0


def test_leases_are_here_before_they_are_needed() -> None:
    """Nobody waits for the coordinator but at the start: an answer takes less than a phase."""
    with_leases = simulate(run_of({"name": "diloco", "period": 3}), timing_only=True)
    without = simulate(run_of({"name": "diloco", "period": 3}, leases=False), timing_only=True)
    assert with_leases.seconds == pytest.approx(without.seconds + 2 * 0.01)


def test_while_the_coordinator_is_away_workers_have_a_phase_in_hand() -> None:
    away = {"at_s": 0.35, "kind": "coordinator", "until_s": 0.65}
    rule = {"name": "noloco", "period": 4}
    fleet = {"workers": [{"count": 4}]}
    quiet = simulate(run_of(rule, fleet=fleet), timing_only=True)
    assert simulate(run_of(rule, away, fleet=fleet), timing_only=True).seconds == pytest.approx(quiet.seconds)


def test_a_stream_of_their_own_is_what_workers_have_without_leases(asked: list[tuple[int, int, int]]) -> None:
    simulate(run_of({"name": "diloco", "period": 3}, leases=False, steps=6))
    assert {worker for worker, _, _ in asked} == {0, 1, 2, 3}


# What cannot be.


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_lease_samples_or_says_why_not(rule: str) -> None:
    fields: dict[str, Any] = {"inner": {"name": "adopt", "lr": 0.05}} if rule in ("des_loc", "mt_dao") else {}
    if rule == "mt_dao":
        fields = {"inner": {"name": "qhadam", "lr": 0.05}}
    refused = {"gradient_coding", "sr_sgc", "m_sgc", "dbw", "decoupled_diloco", "modest", "pbt", "sgp"}
    if rule in refused:
        with pytest.raises(ConfigError, match=f"leases: under rule '{rule}' .*, so nobody could say which samples"):
            run_of(rule)
        return
    outcome = simulate(run_of(rule, task={"name": "quadratic"}, **fields))
    found = outcome.coverage()
    assert found.samples == 4 * 24 * 4
    assert found == Coverage(samples=4 * 24 * 4, missing=(), repeated=())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1, "leases": False}, "epochs: workers count them together, which needs leases = true"),
        ({"epochs": 1}, "epochs: the task '.*Marks' has an endless stream"),
        ({"epochs": 1, "rule": "fedbuff"}, "epochs: the server of rule 'fedbuff' plans by local steps"),
        (
            {"epochs": 1, "rule": {"name": "diloco", "period": {"name": "timed", "seconds": 1}}},
            "epochs: when the samples are used up all workers end at the same local step, and 'timed' fits",
        ),
        ({"epochs": 0}, "epochs: .* greater than or equal to 1"),
    ],
)
def test_bad_input_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(**{"rule": {"name": "diloco"}, **fields})


def test_a_journal_that_contradicts_itself_is_not_believed() -> None:
    outcome = simulate(run_of({"name": "diloco", "period": 3}), timing_only=True)
    outcome.verify()
    outcome.records.remove(of(Leased, outcome)[-1])
    with pytest.raises(VerificationError, match=r"'trained' at .*: it trained on 12 samples, of which it had leased"):
        outcome.verify()
