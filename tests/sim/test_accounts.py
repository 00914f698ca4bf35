"""What a run used and what it cost: closed forms, and what must add up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from test_world import CRASH, LATENCY_S, STEP_S, UNEVEN, Alone, Burst, make_run

from decentral.accounts import Accounts, LinkAccount, WorkerAccount
from decentral.errors import ConfigError
from decentral.fleet.devices import device_named
from decentral.journal import Left, Metered, Spent, Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import RULES
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch

BATCH = 8
EVERYTHING = Watch(links=True, checks=True, spans=True)


def accounts_of(outcome: Outcome) -> Accounts:
    assert outcome.accounts is not None
    return outcome.accounts


def worker(outcome: Outcome, number: int) -> WorkerAccount:
    (account,) = [account for account in accounts_of(outcome).workers if account.worker == number]
    return account


def link(outcome: Outcome, kind: str, source: int | str | None, target: int | str | None) -> LinkAccount:
    (found,) = [
        each for each in accounts_of(outcome).links if (each.kind, each.source, each.target) == (kind, source, target)
    ]
    return found


# Money and energy.


def test_a_machine_costs_its_price_for_the_time_it_is_rented() -> None:
    # Alone at speeds 1 and 0.5, 100 steps take 5 s and 10 s.
    groups = [{"dollars_per_hour": 3.6}, {"speed": 0.5, "dollars_per_hour": 7.2}]
    outcome = simulate(make_run(Alone(), steps=100, fleet={"workers": groups}), timing_only=True)
    assert [account.rented_s for account in accounts_of(outcome).workers] == pytest.approx([5.0, 10.0])
    assert [account.dollars for account in accounts_of(outcome).workers] == pytest.approx([0.005, 0.02])
    assert accounts_of(outcome).dollars == pytest.approx(0.025)


def test_a_crash_ends_the_bill_and_begins_the_time_down() -> None:
    groups = [{"count": 2, "dollars_per_hour": 3600.0}]
    fleet = {"workers": groups, "events": [{"at_s": 2.0, "worker": 1}]}
    outcome = simulate(make_run(Alone(), steps=100, fleet=fleet), timing_only=True)
    crashed = worker(outcome, 1)
    assert (crashed.rented_s, crashed.dollars, crashed.down_s) == pytest.approx((2.0, 2.0, 3.0))
    assert worker(outcome, 0).down_s == 0.0


def test_energy_is_power_by_time_at_work_and_idle() -> None:
    # The faster worker computes 0.25 s, and waits for the other 0.25 s more; what talk takes comes on top.
    groups = [{"watts": 300.0, "idle_watts": 50.0}, {"speed": 0.5, "watts": 200.0}]
    outcome = simulate(make_run("gossip", steps=5, fleet={"workers": groups}), timing_only=True)
    first, second = accounts_of(outcome).workers
    assert first.joules == pytest.approx(300.0 * 5 * STEP_S + 50.0 * (first.rented_s - 5 * STEP_S))
    assert second.joules == pytest.approx(200.0 * 10 * STEP_S)
    assert accounts_of(outcome).joules == pytest.approx((first.joules or 0) + (second.joules or 0))


def test_only_bytes_between_sites_are_billed_at_the_price_of_the_site_they_leave() -> None:
    # Workers 0 and 1 send 1 MB each to worker 2, which stands where 1 does.
    groups = [{"site": "a"}, {"count": 2, "site": "b"}]
    prices = {"egress_dollars_per_gb": 0.02, "egress": {"a": 0.09}}
    network = {"links": [{"source": "a", "to": "b", "bps": 1e9, "latency_s": LATENCY_S}]}
    fleet = {"workers": groups, "prices": prices, "network": network}
    outcome = simulate(make_run(Burst(), fleet=fleet), timing_only=True)
    assert [account.egress_dollars for account in accounts_of(outcome).workers] == pytest.approx([0.09e-3, 0, 0])
    assert accounts_of(outcome).egress_dollars == pytest.approx(0.09e-3)
    assert link(outcome, "sites", "a", "b").nbytes == 10**6
    assert [each.target for each in accounts_of(outcome).links if each.kind == "sites"] == ["b"]


def test_a_device_brings_its_list_price_if_asked_and_its_board_power() -> None:
    known = device_named("V100")
    shared = {"device": "V100", "step_time_s": STEP_S}
    groups = [{**shared, "billing": "on_demand"}, {**shared, "billing": "spot"}, {**shared, "watts": 100}]
    outcome = simulate(make_run(Alone(), steps=100, fleet={"workers": groups}), timing_only=True)
    on_demand, spot, own = accounts_of(outcome).workers
    assert known.dollars_per_hour
    assert known.spot_dollars_per_hour
    assert on_demand.dollars == pytest.approx(known.dollars_per_hour * 5.0 / 3600)
    assert spot.dollars == pytest.approx(known.spot_dollars_per_hour * 5.0 / 3600)
    assert (own.dollars, own.joules, spot.joules) == (None, pytest.approx(500.0), pytest.approx(5.0 * known.watts))


def test_what_nobody_has_priced_is_unknown_and_not_free() -> None:
    groups = [{"dollars_per_hour": 1.0, "watts": 10.0}, {}]
    outcome = simulate(make_run("gossip", steps=5, fleet={"workers": groups}), timing_only=True)
    assert worker(outcome, 0).dollars is not None
    assert worker(outcome, 1).dollars is worker(outcome, 1).joules is worker(outcome, 1).egress_dollars is None
    assert accounts_of(outcome).dollars is accounts_of(outcome).joules is accounts_of(outcome).egress_dollars is None


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"workers": [{"dollars_per_hour": -1}]}, r"fleet\.workers\.0\.dollars_per_hour: .*greater than or equal to 0"),
        ({"workers": [{"watts": 0}]}, r"fleet\.workers\.0\.watts: .*greater than 0"),
        ({"workers": [{"dollars_per_hour": math.inf}]}, r"dollars_per_hour: .*finite"),
        ({"workers": [{"billing": "spot"}]}, r"fleet\.workers\.0: billing needs a device"),
        (
            {"workers": [{"device": "T4", "step_time_s": 1.0, "billing": "spot"}]},
            r'fleet\.workers\.0: device = "T4" has no list price for spot; give dollars_per_hour',
        ),
        (
            {"workers": [{"device": "T4", "step_time_s": 1.0, "billing": "on_demand", "dollars_per_hour": 1}]},
            r"billing and dollars_per_hour both say",
        ),
        ({"prices": {"egress_dollars_per_gb": -0.1}}, r"fleet\.prices\.egress_dollars_per_gb: "),
        ({"prices": {"egres": {}}}, r"unknown field 'egres'; did you mean 'egress'"),
        (
            {"workers": [{"count": 2, "site": "home"}], "prices": {"egress": {"hone": 0.1}}},
            r"fleet\.prices\.egress\.hone: no group is at 'hone'; did you mean 'home'\? sites: home",
        ),
    ],
)
def test_absurd_prices_are_refused_by_name(fleet: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run("gossip", fleet=fleet)


# Links.


def test_links_carry_and_peak_as_the_bandwidths_say() -> None:
    # Two frames of 1 MB share a downlink of 8 Mbit/s for 2 s; each uplink has half of its own.
    fleet = {"up_bps": 8e6, "down_bps": 8e6}
    outcome = simulate(make_run(Burst(), workers=3, fleet=fleet), timing_only=True, watch=Watch(links=True))
    rented_s = 2.0 + LATENCY_S
    for source in (0, 1):
        up = link(outcome, "up", source, None)
        assert (up.nbytes, up.capacity_bps) == (10**6, 8e6)
        assert up.peak_bps == pytest.approx(4e6, rel=1e-12)
        assert up.utilisation == pytest.approx(1.0 / rented_s, rel=1e-12)
        assert link(outcome, "pair", source, 2).nbytes == 10**6
    down = link(outcome, "down", None, 2)
    assert (down.nbytes, down.peak_bps) == (2 * 10**6, pytest.approx(8e6, rel=1e-12))
    assert down.utilisation == pytest.approx(2.0 / rented_s, rel=1e-12)
    assert link(outcome, "down", None, 0).nbytes == link(outcome, "down", None, 0).peak_bps == 0


def test_what_a_crash_has_lost_was_not_carried() -> None:
    fleet = {"up_bps": 8e6, "down_bps": 8e6, "detection_s": 0.75, "events": [{"at_s": 1.0, "worker": 0}]}
    outcome = simulate(make_run(Burst(), workers=3, fleet=fleet), timing_only=True, watch=Watch(links=True))
    assert link(outcome, "up", 0, None).nbytes == link(outcome, "pair", 0, 2).nbytes == 0
    assert link(outcome, "up", 1, None).peak_bps == pytest.approx(8e6, rel=1e-12)  # alone after the crash
    assert outcome.traffic is not None
    assert outcome.traffic.pairs[0, 2].lost == 10**6


@pytest.mark.parametrize("rule", ["ddp", "noloco", "streaming_diloco", "fedbuff"])
def test_no_link_is_used_beyond_its_capacity(rule: str) -> None:
    outcome = simulate(make_run(rule, fleet={**UNEVEN, **CRASH}), timing_only=True, watch=Watch(links=True))
    for each in accounts_of(outcome).links:
        if each.capacity_bps is not None:
            assert each.utilisation is not None
            assert each.peak_bps is not None
            assert 0 <= each.utilisation <= 1
            assert 8 * each.nbytes / outcome.seconds <= each.peak_bps * (1 + 1e-9) <= each.capacity_bps * (1 + 2e-9)


# Samples.


def test_goodput_of_workers_that_never_talk_is_one() -> None:
    outcome = simulate(make_run(Alone(), steps=100, fleet={"workers": [{}, {"speed": 0.5}]}), timing_only=True)
    assert accounts_of(outcome).goodput == pytest.approx(1.0)


def test_goodput_is_the_share_of_rented_time_in_which_equal_workers_compute() -> None:
    outcome = simulate(make_run("gossip", steps=20), timing_only=True)
    assert accounts_of(outcome).goodput == pytest.approx(20 * STEP_S / outcome.seconds)


def test_samples_of_a_crashed_worker_count_up_to_the_last_round_that_had_it() -> None:
    # Rounds take next to nothing: 1 has settled 5 steps at 0.25 s, does 5 more to 0.5 s, and dies in the third phase.
    fleet = {"latency_s": 0.0, "events": [{"at_s": 0.7, "worker": 1}]}
    outcome = simulate(make_run("local_sgd", fleet=fleet), timing_only=True)
    settled = [record.round for record in outcome.records if isinstance(record, Synced) and record.worker == 1]
    assert settled == [1, 2]
    crashed = worker(outcome, 1)
    assert (crashed.samples, crashed.useful_samples) == (10 * BATCH, 10 * BATCH)
    assert crashed.possible_samples == pytest.approx(14 * BATCH)  # 0.7 s at a step every 0.05 s

    before_any_round = {**fleet, "events": [{"at_s": 0.26, "worker": 1}], "latency_s": 0.02}
    crashed = worker(simulate(make_run("local_sgd", fleet=before_any_round), timing_only=True), 1)
    assert (crashed.samples, crashed.useful_samples) == (5 * BATCH, 0)


def test_what_a_crash_has_lost_stays_lost_when_the_worker_is_back() -> None:
    # 1 dies between the end of its second phase and that of its second round, and comes back.
    quiet = simulate(make_run("local_sgd"), timing_only=True).records
    trained_s = [record.time_s for record in quiet if isinstance(record, Trained) and record.worker == 1][1]
    settled_s = [record.time_s for record in quiet if isinstance(record, Synced) and record.worker == 1][1]
    events = [{"at_s": trained_s + 0.1 * (settled_s - trained_s), "worker": 1}]
    events += [{"at_s": 2.0, "kind": "join", "worker": 1}]
    outcome = simulate(make_run("local_sgd", steps=100, fleet={"events": events}))
    assert [left.reason for left in outcome.left() if left.worker == 1] == ["crashed", "finished"]
    back = worker(outcome, 1)
    assert back.samples - back.useful_samples == 5 * BATCH
    assert worker(outcome, 0).useful_samples == worker(outcome, 0).samples == 100 * BATCH


def test_a_run_that_is_stopped_has_the_accounts_of_that_moment() -> None:
    groups = [{"count": 2, "dollars_per_hour": 3600.0}]
    run = make_run("local_sgd", steps=100, fleet={"workers": groups, "latency_s": 0.0})
    fifth = simulate(run, timing_only=True, until=lambda record: isinstance(record, Synced) and record.round == 5)
    assert {left.reason for left in fifth.left()} == {"stopped"}
    assert fifth.seconds == pytest.approx(5 * 5 * STEP_S, rel=1e-2)
    assert accounts_of(fifth).dollars == pytest.approx(2 * fifth.seconds)
    assert [account.useful_samples for account in accounts_of(fifth).workers] == [5 * 5 * BATCH] * 2
    whole = simulate(run, timing_only=True)
    before = [record for record in whole.records if record.time_s < fifth.seconds]
    assert [record for record in fifth.records if record.time_s < fifth.seconds] == before


# What watching leaves as it is, and what must add up.


@pytest.mark.parametrize("rule", RULES)
def test_watching_changes_nothing_that_happens(rule: str) -> None:
    run = make_run(rule, fleet={**UNEVEN, **CRASH}, patience_s=5.0)
    plain, watched = simulate(run, timing_only=True), simulate(run, timing_only=True, watch=EVERYTHING)
    assert [record for record in watched.records if not isinstance(record, Spent | Metered)] == list(plain.records)


@pytest.mark.parametrize("rule", ["ddp", "diloco", "noloco", "fedbuff"])
def test_spans_add_up_to_the_accounts_and_do_not_overlap(rule: str) -> None:
    outcome = simulate(make_run(rule, fleet={**UNEVEN, **CRASH}), timing_only=True, watch=Watch(spans=True))
    for left in outcome.left():
        spans = [record for record in outcome.records if isinstance(record, Spent) and record.worker == left.worker]
        for activity, seconds in left.seconds.items():
            assert math.fsum(span.seconds for span in spans if span.activity == activity) == pytest.approx(seconds)
        ends = [0.0, *[span.time_s for span in spans]]
        assert [span.time_s - span.seconds for span in spans] == pytest.approx(ends[:-1])
        assert ends[-1] == left.time_s


@pytest.mark.parametrize("rule", ["ddp", "noloco", "fedbuff"])
def test_accounts_agree_with_the_last_records(rule: str) -> None:
    outcome = simulate(make_run(rule, fleet={**UNEVEN, **CRASH}), timing_only=True)
    for account, left in zip(accounts_of(outcome).workers, outcome.left(), strict=True):
        assert isinstance(left, Left)
        assert account.rented_s == pytest.approx(account.compute_s + account.talk_s + account.idle_s)
        assert (account.sent_bytes, account.received_bytes) == (left.sent_bytes, left.received_bytes)
        assert account.rented_s + account.down_s <= outcome.seconds * (1 + 1e-12)
        assert account.useful_samples <= account.samples == left.step * BATCH


def test_accounts_are_plain_json() -> None:
    outcome = simulate(make_run("gossip", fleet=UNEVEN), timing_only=True, watch=Watch(links=True))
    fields = json.loads(json.dumps(accounts_of(outcome).to_fields(), allow_nan=False))
    assert fields["goodput"] == accounts_of(outcome).goodput
    assert [each["worker"] for each in fields["workers"]] == [0, 1, 2, 3]
    assert {each["kind"] for each in fields["links"]} == {"up", "down", "pair"}
