"""A run that contradicts itself is caught, whatever part of it was spoiled; one that does not is believed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from cluster import cluster
from sockets import train_here
from test_world import CRASH, UNEVEN, make_run

from decentral.errors import VerificationError
from decentral.journal import Joined, Left, Record, Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import RULES, DiLoCo
from decentral.sim.clock import VirtualLoop
from decentral.sim.network import Flow
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch, WatchedNetwork

R = TypeVar("R", bound=Record)


@pytest.fixture(scope="module")
def run_once() -> Outcome:
    """Return a watched run with a straggler and a crash, which nobody may change."""
    return simulate(make_run("diloco", fleet={**UNEVEN, **CRASH}), timing_only=True, watch=Watch(checks=True))


@pytest.fixture
def outcome(run_once: Outcome) -> Outcome:
    return copy.deepcopy(run_once)


@pytest.mark.parametrize("rule", RULES)
def test_simulated_runs_of_every_rule_are_believed(rule: str) -> None:
    run = make_run(rule, fleet={**UNEVEN, **CRASH}, patience_s=5.0)
    simulate(run, timing_only=True, watch=Watch(checks=True)).verify()


@pytest.mark.parametrize("rule", ["ddp", "diloco", "noloco", "fedbuff"])
def test_no_link_is_overfull_while_capacities_change_and_sites_are_parted(rule: str) -> None:
    link = {"source": "a", "to": "b", "bps": 1e5, "latency_s": 0.02, "daily_dip": 0.5, "busiest_at_s": 0.0}
    parted = {"side": ["a"], "from_s": 0.3, "until_s": 0.9}
    fleet = {
        "workers": [{"count": 2, "site": "a"}, {"count": 2, "site": "b", "speed": 0.5}],
        "network": {"links": [link], "partitions": [parted], "sharing": "rtt_weighted"},
        "events": [{"at_s": 0.5, "worker": 1}],
    }
    task = {"name": "quadratic", "dimension": 1_000}
    run = make_run(rule, fleet=fleet, task=task, patience_s=5.0)
    outcome = simulate(run, timing_only=True, watch=Watch(checks=True))
    assert outcome.traffic is not None
    assert 0 < max(outcome.traffic.site_peak_bps.values()) <= 4e5 * (1 + 1e-9)  # four pairs at the most


def test_real_runs_are_believed() -> None:
    train_here(cluster(DiLoCo(period=3), 3, 9)).verify()


def the(kind: type[R], outcome: Outcome, number: int = -1, worker: int = 2) -> R:
    """Return one of a worker's records of a kind, the last by default."""
    return [record for record in outcome.records if isinstance(record, kind) and record.worker == worker][number]


def repeat(record: Record, outcome: Outcome) -> None:
    """Have the record twice."""
    outcome.records.insert(outcome.records.index(record), record)


def change(record: Record, **fields: Any) -> None:
    """Add to fields of a record."""
    for name, more in fields.items():
        setattr(record, name, getattr(record, name) + more)


def miscount(outcome: Outcome, **fields: int) -> None:
    """Add to what became of the bytes of the first pair that sent any."""
    assert outcome.traffic is not None
    pair = next(pair for pair in outcome.traffic.pairs.values() if pair.sent)
    for name, more in fields.items():
        setattr(pair, name, getattr(pair, name) + more)


Spoil = Callable[[Outcome], object]

SPOILED: dict[str, tuple[Spoil, str]] = {
    "clock of one worker": (lambda o: change(the(Left, o), time_s=-10.0), "the clock went back"),
    "clock of all": (lambda o: o.records.sort(key=lambda record: record.worker), "the clock went back"),
    "no clock": (lambda o: change(the(Synced, o), time_s=float("nan")), "the clock went back"),
    "joined twice": (lambda o: repeat(the(Joined, o), o), "has not left since"),
    "never joined": (lambda o: o.records.remove(the(Joined, o)), "not in the run: it never joined"),
    "never left": (lambda o: o.records.remove(the(Left, o)), "worker 2 joined at 0.0 s and never left"),
    "left twice": (lambda o: repeat(the(Left, o), o), "not in the run: it has left"),
    "samples twice": (lambda o: repeat(the(Trained, o), o), "steps 16 to 20 do not follow step 20"),
    "samples lost": (lambda o: o.records.remove(the(Trained, o, 1)), "steps 11 to 15 do not follow step 5"),
    "last samples lost": (lambda o: o.records.remove(the(Trained, o)), "leaves after 20 steps, its journal has 15"),
    "too few samples": (lambda o: change(the(Trained, o), samples=-1), "39 samples in 5 steps, where others have 8"),
    "overlapping work": (lambda o: change(the(Trained, o), seconds=1.0), "cannot have begun before"),
    "work before joining": (lambda o: change(the(Trained, o, 0), seconds=1.0), "cannot have begun before 0.0 s"),
    "negative work": (lambda o: change(the(Trained, o), seconds=-10.0), "cannot have begun"),
    "round twice": (lambda o: repeat(the(Synced, o), o), "ends after round 4 has"),
    "rounds in disorder": (lambda o: change(the(Synced, o, 0), round=2), "round 2 of '.*' ends after round 3 has"),
    "missing second": (lambda o: the(Left, o).seconds.update(wait=0.0), "its accounts have"),
    "negative seconds": (lambda o: the(Left, o).seconds.update(wait=-1.0), "negative seconds"),
    "bytes from nowhere": (lambda o: miscount(o, received=1), "sent worker"),
    "bytes to nowhere": (lambda o: miscount(o, lost=1), "sent worker"),
    "bytes that were not sent": (lambda o: change(the(Left, o), sent_bytes=1), "counted .* bytes sent, the network"),
    "bytes that did not come": (lambda o: change(the(Left, o), received_bytes=1), "bytes received, the network"),
    "bytes by the network alone": (lambda o: miscount(o, sent=1, received=1), "bytes sent, the network"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_was_spoiled_is_caught_and_named(outcome: Outcome, name: str) -> None:
    outcome.verify()
    spoil, message = SPOILED[name]
    spoil(outcome)
    with pytest.raises(VerificationError, match=message):
        outcome.verify()


def test_a_late_joiner_begins_where_its_state_was_taken() -> None:
    stay: list[Record] = [
        Joined(time_s=5.0, worker=0, parameters=1),
        Trained(time_s=6.0, worker=0, step=15, steps=5, samples=40, seconds=1.0, loss=None),
        Left(
            time_s=6.0,
            worker=0,
            reason="crashed",
            step=15,
            seconds={"compute": 1.0},
            sent_bytes=0,
            received_bytes=0,
            messages_sent=0,
        ),
    ]
    Outcome(stay, 6.0).verify()
    again = copy.deepcopy(stay)
    for record in again:
        record.time_s += 4.0
    Outcome([*stay, *again], 10.0).verify()  # where its host was, which need not be where it had been itself
    change(again[2], step=5)
    with pytest.raises(VerificationError):
        Outcome([*stay, *again], 10.0).verify()


class Generous(WatchedNetwork):
    """A network that gives every flow twice its share."""

    def _set_rate(self, flow: Flow, rate_bps: float, now: float) -> None:
        super()._set_rate(flow, 2 * rate_bps, now)


def make_network(cls: type[WatchedNetwork], checks: bool) -> tuple[VirtualLoop, WatchedNetwork]:
    loop = VirtualLoop()
    network = cls(
        loop, up_bps=[8.0] * 3, down_bps=[8.0] * 3, latency_s=lambda src, dst: 0.0, sites=[None] * 3, checks=checks
    )
    return loop, network


def carry(loop: VirtualLoop, network: WatchedNetwork) -> None:
    """Send two flows to one node, and wait for both."""
    both = [loop.create_future() for _ in range(2)]
    for source, arrived in enumerate(both):
        network.transfer(source, 2, 1, arrived.set_result)
    for arrived in both:
        loop.run_until_complete(arrived)
    loop.close()


def test_a_link_above_its_capacity_is_caught_at_that_instant() -> None:
    carry(*make_network(WatchedNetwork, checks=True))
    carry(*make_network(Generous, checks=False))
    with pytest.raises(VerificationError, match=r"network at 0\.0 s: .*link of node 2 carries 16\.0 bit/s of 8\.0"):
        carry(*make_network(Generous, checks=True))
