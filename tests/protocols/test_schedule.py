"""When to talk: a number is a schedule, and the budget ends the last phase."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import cluster
from pydantic import ValidationError

from decentral.errors import ConfigError
from decentral.journal import Trained
from decentral.peer import Peer
from decentral.protocols import (
    PBT,
    AutoLoCo,
    DiLoCo,
    DyLU,
    Every,
    Gossip,
    HierarchicalDiLoCo,
    LocalSGD,
    NoLoCo,
    Schedule,
    SingleMerge,
    StreamingDiLoCo,
    Timed,
)
from decentral.sim.simulate import simulate


class Growing(Schedule):
    """1, 2, 3, ... steps between rounds."""

    def steps(self, peer: Peer) -> int:
        done, length = 0, 1
        while done + length <= peer.step:
            done, length = done + length, length + 1
        return length


def phases(schedule: Any, steps: int) -> list[int]:
    outcome = simulate(cluster(LocalSGD(period=schedule), 2, steps))
    return [record.steps for record in outcome.records if isinstance(record, Trained) and record.worker == 1]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (1, 3, [1, 1, 1]),
        (4, 12, [4, 4, 4]),
        (4, 13, [4, 4, 4, 1]),
        (50, 7, [7]),
        (Growing(), 11, [1, 2, 3, 4, 1]),
    ],
)
def test_phases(schedule: Any, steps: int, expected: list[int]) -> None:
    assert phases(schedule, steps) == expected


@pytest.mark.parametrize("spelled", [7, {"name": "every", "period": 7}, Every(period=7)])
@pytest.mark.parametrize("rule", [DiLoCo, LocalSGD, NoLoCo, Gossip, SingleMerge])
def test_a_period_may_be_spelled_as_a_number_a_table_or_a_schedule(rule: Any, spelled: Any) -> None:
    assert rule(period=spelled).period == Every(period=7)


def test_a_schedule_of_ones_own_is_named_by_module_and_class() -> None:
    rule = DiLoCo(period={"name": "test_schedule:Growing"})  # type: ignore[arg-type]
    assert isinstance(rule.period, Growing)
    assert rule.to_table()["period"] == {"name": "test_schedule:Growing"}


@pytest.mark.parametrize("wrong", [0, -3, True, 2.5, "sometimes", {"name": "every"}, {"period": 3}, None])
def test_what_is_no_period_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        DiLoCo(period=wrong)


@pytest.mark.parametrize("wrong", [{"name": "dylu"}, {"name": "dylu", "period": 0}, {"name": "timed", "seconds": 0}])
def test_schedules_by_speed_need_a_length(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        DiLoCo(period=wrong)


@pytest.mark.parametrize("schedule", [DyLU(period=4), Timed(seconds=1)], ids=["dylu", "timed"])
@pytest.mark.parametrize("rule", [AutoLoCo, HierarchicalDiLoCo, PBT, SingleMerge], ids=lambda rule: rule.name)
def test_rules_whose_workers_count_steps_together_take_equal_phases_alone(rule: Any, schedule: Schedule) -> None:
    with pytest.raises(ValidationError, match=f"'{schedule.name}' fits them to each one's speed.*every"):
        rule(period=schedule)


def test_rules_that_talk_at_fixed_steps_take_no_schedule_by_speed() -> None:
    with pytest.raises(ValidationError, match="not 'dylu'"):
        StreamingDiLoCo(period=DyLU(period=4))  # type: ignore[arg-type]


def test_workers_that_end_at_one_local_step_take_equal_phases() -> None:
    DiLoCo(period=DyLU(period=4)).check_leases(bounded=False)
    with pytest.raises(ConfigError, match="'dylu' fits steps to each one's speed; give steps in place of epochs"):
        DiLoCo(period=DyLU(period=4)).check_leases(bounded=True)
