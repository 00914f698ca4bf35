"""The tasks that come with decentral, and `load_task` for them and for a user's own."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from decentral.errors import DecentralError, TaskError
from decentral.task import Task
from decentral.tasks.images import FashionMNIST
from decentral.tasks.quadratic import Quadratic
from decentral.tasks.text import ByteGPT

__all__ = ["TASKS", "ByteGPT", "FashionMNIST", "Quadratic", "load_task"]

TASKS: dict[str, type[Task]] = {"byte_gpt": ByteGPT, "fashion_mnist": FashionMNIST, "quadratic": Quadratic}
"""The built-in tasks by the name that run files use."""


def load_task(name: str, /, **fields: Any) -> Task:
    """Return the task of a built-in name, or of `package.module:attribute`, made with the fields.

    The attribute is a `Task` subclass or a callable that returns a `Task`. Modules are looked for where Python looks
    for them, then in the current directory, which stays importable if the module is there. Raises `TaskError` if the
    task cannot be had, and `pydantic.ValidationError` if it refuses a field.
    """
    if name in TASKS:
        return TASKS[name](**fields)
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise TaskError(
            f"no task is called {name!r}; the built-in ones are {', '.join(TASKS)}, "
            f"and your own is written module:function or module:Class, for example my_project.tasks:my_task"
        )
    return _make(name, _attribute(_module(module_name), attribute), fields)


def _module(name: str) -> ModuleType:
    try:
        return _import(name)
    except ModuleNotFoundError:
        here = os.getcwd()
        sys.path.insert(0, here)
        importlib.invalidate_caches()
        try:
            return _import(name)
        except ModuleNotFoundError as error:
            sys.path.remove(here)
            raise TaskError(
                f"task module {name!r} was not found: {error}; looked on Python's path and in {here}"
            ) from error
        except TaskError:
            sys.path.remove(here)
            raise


def _import(name: str) -> ModuleType:
    """Import a module; `ModuleNotFoundError` means the module itself or a package around it is not there."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise
        raise TaskError(f"task module {name!r} could not be imported: {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(name, public)
        hint = f"did you mean {' or '.join(near)}?" if near else "it must name a Task subclass or a function there"
        raise TaskError(f"module {module.__name__!r} ({module.__file__}) has no {name!r}; {hint}") from None


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
