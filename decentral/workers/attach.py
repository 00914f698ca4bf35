"""Asking a running job how it is: its coordinator is a named Ray actor, which anybody on the cluster may find."""

from __future__ import annotations

import re
from typing import Any

import ray
import ray.exceptions
import ray.util

from decentral.errors import RunError
from decentral.workers.job import NAMESPACE
from decentral.workers.status import Status

ANSWER_S = 10.0
"""Seconds a coordinator has to answer."""

_COORDINATOR = re.compile(r"(?P<run>.+)-coordinator(-life-(?P<life>\d+))?")


def runs() -> dict[str, str]:
    """Return the runs on the cluster that this process is connected to: names, and the actors that coordinate them."""
    found: dict[str, tuple[int, str]] = {}
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    for actor in actors:
        match = _COORDINATOR.fullmatch(actor["name"])
        if match is not None and actor["namespace"] == NAMESPACE:
            life = int(match["life"] or 0)
            found[match["run"]] = max(found.get(match["run"], (0, "")), (life, actor["name"]))
    return {run: name for run, (_, name) in sorted(found.items())}


def the_run(wanted: str | None) -> str:
    """Return the name of the run that is meant: the only one, or `wanted`. Raises `RunError`."""
    running = list(runs())
    if wanted is not None and wanted not in running:
        raise RunError(f"--run {wanted}: no such run is on this cluster; running: {', '.join(running) or 'none'}")
    if not running:
        raise RunError("no run is on this cluster now; for one that is over, name its folder, such as runs/x")
    if wanted is None and len(running) > 1:
        raise RunError(f"{len(running)} runs are on this cluster: {', '.join(running)}; name one with --run")
    return wanted or running[0]


def ask(run: str) -> Status | None:
    """Return the run's status; None, if it has no coordinator any more. Raises `RunError` if it does not answer."""
    name = runs().get(run)
    if name is None:
        return None
    try:
        coordinator: Any = ray.get_actor(name, namespace=NAMESPACE)
        status: Status = ray.get(coordinator.status.remote(run), timeout=ANSWER_S)
    except (ValueError, ray.exceptions.ActorDiedError):  # it has gone since we looked
        return None
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the coordinator of {run} does not answer ({type(error).__name__}); its driver starts a new one when it "
            "has died: ask again in a moment"
        ) from None
    return status
