"""The tasks that come with decentral, and `load_task` for them and for a user's own."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from decentral.errors import DecentralError, TaskError
from decentral.loading import LoadError, load
from decentral.task import Task
from decentral.tasks.decoders import decoder_blocks, logits_of
from decentral.tasks.hugging_face import HFCausalLM
from decentral.tasks.images import FashionMNIST
from decentral.tasks.quadratic import Quadratic
from decentral.tasks.stack import LayerStack
from decentral.tasks.text import ByteGPT

__all__ = [
    "TASKS",
    "ByteGPT",
    "FashionMNIST",
    "HFCausalLM",
    "LayerStack",
    "Quadratic",
    "decoder_blocks",
    "load_task",
    "logits_of",
]

TASKS: dict[str, type[Task]] = {
    "byte_gpt": ByteGPT,
    "fashion_mnist": FashionMNIST,
    "hf_causal_lm": HFCausalLM,
    "layer_stack": LayerStack,
    "quadratic": Quadratic,
}
"""The built-in tasks by the name that run files use."""


def load_task(name: str, /, **fields: Any) -> Task:
    """Return the task of a built-in name, or of `package.module:attribute`, made with the fields.

    The attribute is a `Task` subclass or a callable that returns a `Task`. Raises `TaskError` if the task cannot be
    had, and `pydantic.ValidationError` if it refuses a field.
    """
    if name in TASKS:
        return TASKS[name](**fields)
    if not all(name.partition(":")):
        raise TaskError(
            f"no task is called '{name}'; the built-in ones are {', '.join(TASKS)}, "
            f"and your own is written module:function or module:Class, for example my_project.tasks:my_task"
        )
    try:
        factory = load(name)
    except LoadError as error:
        raise TaskError(f"task '{name}': {error}") from error
    return _make(name, factory, fields)


def _make(name: str, factory: Any, fields: dict[str, Any]) -> Task:
    if not callable(factory):
        raise TaskError(
            f"{name} is a {type(factory).__name__}; it must be a Task subclass or a function that returns a Task"
        )
    try:
        task = factory(**fields)
    except (DecentralError, ValidationError):
        raise
    except Exception as error:  # a user's function may raise anything
        raise TaskError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise TaskError(f"{name} returned a {type(task).__name__}; it must return a Task")
    return task
