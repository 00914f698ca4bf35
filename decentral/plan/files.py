"""What `decentral plan` reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from decentral.config import read_run
from decentral.errors import ConfigError
from decentral.plan.wanted import GOALS, Goal
from decentral.plan.work import Work, work_of


def read_work(
    path: Path,
    settings: Sequence[str] = (),
    task: str | None = None,
    *,
    parameters: float | None = None,
    layers: int | None = None,
    context: int | None = None,
    samples: float | None = None,
    tokens: float | None = None,
) -> Work:
    """Return the work on the fleet of a run file: its own task, or a model of which only the size is known.

    With `parameters` there is a stack of so many equal `layers` in place of the task, whose samples are `context`
    tokens each. Raises `ConfigError`.
    """
    if parameters is None:
        for name, value in (("--layers", layers), ("--context", context)):
            if value is not None:
                raise ConfigError(f"{name}: the task says it; give --params too for a model in place of the task")
        return work_of(read_run(path, settings, task), samples=samples, tokens=tokens)
    if not 1 <= parameters < math.inf:
        raise ConfigError(f"--params {parameters:g}: give the number of the model's parameters, such as --params 1.3e9")
    if task is not None:
        raise ConfigError("--params and --task both say what is trained; give one of them")
    if tokens is not None and context is None:
        raise ConfigError("--tokens: give --context too, the tokens of a sample, such as --context 2048")
    shape = {"layers": layers, "tokens": context}
    given = [f"task.{field}={value}" for field, value in shape.items() if value is not None]
    model = ["task.name=layer_stack", f"task.parameters={parameters!r}", *given]
    return work_of(read_run(path, [*model, *settings]), samples=samples, tokens=tokens)


def goal_of(text: str) -> Goal:
    """Return what --for says; raises `ConfigError`."""
    for goal in GOALS:
        if goal == text:
            return goal
    raise ConfigError(f"--for {text}: choose one of {', '.join(GOALS)}")
