"""`module:attribute`: how a user's own task, rule or codec is found."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from types import ModuleType
from typing import Any


class LoadError(ValueError):
    """What a `module:attribute` names cannot be had; the message says why."""


def load(name: str) -> Any:
    """Return what `package.module:attribute` names.

    Modules are looked for where Python looks for them, then in the current directory, which stays importable if the
    module is there. Raises `LoadError`.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise LoadError(f"'{name}' is not of the form module:attribute")
    return _attribute(_module(module), attribute)


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
            raise LoadError(f"module '{name}' was not found ({error}); looked on Python's path and {here}") from error
        except LoadError:
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
        raise LoadError(f"module '{name}' could not be imported: {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(name, public)
        hint = f"did you mean {' or '.join(near)}?" if near else "nothing there has a name like it"
        raise LoadError(f"module '{module.__name__}' ({module.__file__}) has no '{name}'; {hint}") from None
