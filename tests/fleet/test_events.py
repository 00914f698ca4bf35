"""Events as run files spell them, and the order in which they befall single workers."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from pydantic import ValidationError

from decentral.config import validated
from decentral.errors import ConfigError
from decentral.fleet import Event, Fleet, WorkerGroup
from decentral.fleet.churn import Preemption
from decentral.fleet.happenings import happenings, happenings_until, starters

EAST, WEST = WorkerGroup(count=4, site="east"), WorkerGroup(count=3, site="west")


def told(fleet: Fleet, seed: int = 0, horizon_s: float = 1e9) -> list[tuple[float, str, int | None]]:
    return [(event.at_s, event.kind, event.worker) for event in happenings_until(fleet, seed, horizon_s)]


def test_listed_events_come_in_the_order_of_their_time() -> None:
    events = (Event(at_s=9, worker=1), Event(at_s=3, kind="slow", factor=0.5, worker=0), Event(at_s=9, worker=0))
    assert told(Fleet(workers=(EAST,), events=events)) == [(3, "slow", 0), (9, "crash", 1), (9, "crash", 0)]


def test_a_group_event_takes_so_many_of_its_site_by_chance_alone() -> None:
    fleet = Fleet(workers=(EAST, WEST), events=(Event(at_s=600, count=2, site="west"),))
    chosen = {tuple(worker for _, _, worker in told(fleet, seed)) for seed in range(40)}
    assert chosen == {(4, 5), (4, 6), (5, 6)}
    assert told(fleet, 7) == told(fleet, 7)


def test_a_group_event_takes_only_who_is_there() -> None:
    events = (Event(at_s=1, worker=0), Event(at_s=2, kind="preempt", count=2, notice_s=30), Event(at_s=3, count=4))
    fleet = Fleet(workers=(EAST,), events=events)
    for seed in range(10):
        assert sorted(worker for _, _, worker in told(fleet, seed)) == [0, 1, 2, 3]
        assert len(told(fleet, seed)) == 4


def test_who_joins_is_one_of_those_who_are_gone() -> None:
    events = (Event(at_s=1, site="west"), Event(at_s=2, kind="join", count=1), Event(at_s=3, kind="join", site="west"))
    for seed in range(10):
        names = told(Fleet(workers=(EAST, WEST), events=events), seed)
        first = names[3][2]
        assert [worker for _, _, worker in names[:3]] == [4, 5, 6]
        assert sorted(worker for _, _, worker in names[3:] if worker is not None) == [4, 5, 6]
        assert first in (4, 5, 6)


def test_a_late_group_joins_when_it_starts() -> None:
    fleet = Fleet(workers=(WorkerGroup(count=2), WorkerGroup(count=2, start_s=60)), events=(Event(at_s=70, count=4),))
    assert starters(fleet) == {0, 1}
    assert told(fleet) == [
        (60, "join", 2),
        (60, "join", 3),
        (70, "crash", 0),
        (70, "crash", 1),
        (70, "crash", 2),
        (70, "crash", 3),
    ]


def test_looking_further_ahead_changes_nothing_before() -> None:
    churn = Preemption(rate_per_hour=5, group_mean=2, reacquire_s=300)
    fleet = Fleet(workers=(EAST, WEST), churn=churn, events=(Event(at_s=900, count=2, site="east"),))
    near, far = happenings_until(fleet, 3, 1800), happenings_until(fleet, 3, 7200)
    assert far[: len(near)] == near
    assert len(far) > len(near) > 10
    assert list(islice(happenings(fleet, 3), len(far))) == list(far)
    assert [event.at_s for event in far] == sorted(event.at_s for event in far)
    assert far != happenings_until(fleet, 4, 7200)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({}, "whom? give worker = 3"),
        ({"worker": 1, "count": 2}, "worker names one worker"),
        ({"worker": 1, "notice_s": 30}, 'kind = "crash" has no notice_s'),
        ({"kind": "slow", "worker": 1}, 'kind = "slow" needs factor'),
        ({"kind": "slow", "worker": 1, "factor": 0}, "greater than 0"),
        ({"kind": "link", "worker": 1, "factor": 2}, "less than or equal to 1"),
        ({"kind": "slow", "worker": 1, "factor": 0.5, "until_s": 5}, "until_s = 5 must be after at_s = 10"),
        ({"kind": "coordinator"}, 'kind = "coordinator" needs until_s'),
        ({"kind": "coordinator", "until_s": 20, "worker": 1}, 'kind = "coordinator" has no worker'),
        ({"kind": "preempt", "worker": 1, "notice_s": -1}, "greater than or equal to 0"),
        ({"kind": "explode", "worker": 1}, "'crash', 'preempt'"),
        ({"worker": 1, "site": "east"}, "worker names one worker"),
        ({"count": 0}, "greater than or equal to 1"),
        ({"worker": 1, "at": 3}, "unknown field 'at'; did you mean 'at_s'?"),
    ],
)
def test_a_wrong_event_is_refused(event: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Event(**{"at_s": 10, **event})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"worker": 7}, "fleet.events.0.worker: 7, but workers are numbered 0 to 6"),
        ({"site": "eastt"}, "fleet.events.0.site: no group is at 'eastt'; did you mean 'east'? sites: east, west"),
        ({"count": 4, "site": "west"}, "fleet.events.0.count: 4, but there are 3 workers to choose from"),
    ],
)
def test_an_event_that_does_not_fit_the_fleet_is_refused(event: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Fleet(workers=(EAST, WEST), events=(Event(at_s=1, **event),)).check()
    assert str(caught.value) == words


def test_a_run_file_spells_events_in_one_line() -> None:
    line = {"at_s": 600, "kind": "crash", "count": 3, "site": "east"}
    run = validated({"fleet": {"workers": [{"count": 4, "site": "east"}], "events": [line]}}, "run")
    assert run.fleet.events == (Event(at_s=600, kind="crash", count=3, site="east"),)
    assert validated(run.to_table(), "run") == run
