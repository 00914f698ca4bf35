"""Which rules keep too much for which devices."""

from __future__ import annotations

from collections.abc import Iterable

from decentral.errors import ConfigError
from decentral.fleet import Fleet, WorkerGroup
from decentral.plan.forecast import ENDLESS_S
from decentral.plan.work import Work
from decentral.protocols import SyncRule
from decentral.sim.simulate import simulate


def unfit(work: Work, rules: Iterable[SyncRule]) -> dict[tuple[str, str], str]:
    """Return why the model does not fit into a device's memory, by the names of the rule and the device.

    Two workers, who have nothing to wait for, make in one step all that a worker keeps. What they keep is told by the
    kind of rule: periods and codecs that are tried do not change it.
    """
    kinds = {rule.spelling(): rule for rule in rules}
    devices = dict.fromkeys(group.device for group in work.run.fleet.workers if group.device)
    found: dict[tuple[str, str], str] = {}
    for name, rule in kinds.items():
        for device in devices:
            pair = Fleet(workers=(WorkerGroup(count=2, device=device, step_time_s=1.0),), latency_s=0.0)
            alone = {"fleet": pair, "rule": rule, "steps": 1, "patience_s": ENDLESS_S}
            try:
                simulate(work.run.model_copy(update=alone), timing_only=True)
            except ConfigError as error:
                found[name, device] = str(error)
    return found
