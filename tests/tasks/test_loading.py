"""`load_task`: built-in names, a user's own modules, and one clear message for whatever is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from decentral.errors import TaskError
from decentral.tasks import TASKS, ByteGPT, Quadratic, load_task

MODULE = """
from decentral.tasks import Quadratic

class Steep(Quadratic):
    curvature: tuple[float, ...] = (10.0, 10.0)

def make_quadratic(dimension=3):
    return Quadratic(dimension=dimension)

def make_nothing():
    return None

def fail():
    raise KeyError("corpus")

def misspell():
    return Quadratic(dimensions=3)

number = 5
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's project as the current directory, with the module `user_tasks`."""
    (tmp_path / "user_tasks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(name: str, **fields: object) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(name, **fields)
    return str(caught.value)


def test_a_built_in_name_with_fields() -> None:
    assert load_task("quadratic", dimension=3) == Quadratic(dimension=3)
    assert load_task("byte_gpt") == ByteGPT()


def test_every_built_in_task_can_be_made_without_fields() -> None:
    assert {name: type(load_task(name)) for name in TASKS} == TASKS
    assert [kind.name for kind in TASKS.values()] == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_can_be_made_again_from_its_table(name: str) -> None:
    task = load_task(name)
    table = task.to_table()
    assert load_task(table.pop("name"), **table) == task


def test_a_class_and_a_function_of_the_current_directory(project: Path) -> None:
    assert load_task("user_tasks:make_quadratic", dimension=4) == Quadratic(dimension=4)
    steep = load_task("user_tasks:Steep", dimension=4)
    assert isinstance(steep, Quadratic)
    assert steep.curvature == (10.0, 10.0)


def test_a_module_on_the_path_needs_no_current_directory(project: Path) -> None:
    before = list(sys.path)
    assert load_task("decentral.tasks.quadratic:Quadratic") == Quadratic()
    assert sys.path == before


def test_a_package_of_the_current_directory(project: Path) -> None:
    (project / "user_package").mkdir()
    (project / "user_package" / "tasks.py").write_text("from user_tasks import make_quadratic")
    assert load_task("user_package.tasks:make_quadratic") == Quadratic(dimension=3)


@pytest.mark.parametrize("name", ["bite_gpt", "user_tasks", "user_tasks:", ":make"])
def test_an_unknown_name_lists_the_built_in_ones_and_how_to_write_ones_own(name: str) -> None:
    message = refusal(name)
    assert repr(name) in message
    assert "byte_gpt, fashion_mnist, hf_causal_lm, layer_stack, quadratic" in message
    assert "module:function" in message


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.module", "decentral.no_such"])
def test_a_module_that_is_not_there(project: Path, name: str) -> None:
    before = list(sys.path)
    message = refusal(f"{name}:make")
    assert f"module {name!r} was not found" in message
    assert str(project) in message
    assert sys.path == before


def test_a_module_that_cannot_be_imported(project: Path) -> None:
    before = list(sys.path)
    (project / "user_broken.py").write_text("import no_such_dependency")
    assert "'user_broken' could not be imported: ModuleNotFoundError: No module named 'no_such_dependency'" in refusal(
        "user_broken:make"
    )
    (project / "user_broken.py").write_text("1 / 0")
    assert "ZeroDivisionError: division by zero" in refusal("user_broken:make")
    assert sys.path == before


def test_a_misspelt_attribute_lists_the_near_ones(project: Path) -> None:
    message = refusal("user_tasks:make_quadradic")
    assert "has no 'make_quadradic'; did you mean make_quadratic" in message
    assert "user_tasks.py" in message


def test_an_attribute_far_from_all_others(project: Path) -> None:
    assert "has no 'xyzzy'; nothing there has a name like it" in refusal("user_tasks:xyzzy")


def test_what_is_not_callable_is_refused(project: Path) -> None:
    assert refusal("user_tasks:number") == (
        "user_tasks:number is a int; it must be a Task subclass or a function that returns a Task"
    )


def test_a_function_that_returns_no_task_is_refused(project: Path) -> None:
    assert refusal("user_tasks:make_nothing") == "user_tasks:make_nothing returned a NoneType; it must return a Task"


def test_the_error_of_a_function_that_raises_is_kept(project: Path) -> None:
    with pytest.raises(TaskError, match="user_tasks:fail raised KeyError: 'corpus'") as caught:
        load_task("user_tasks:fail")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_field_that_a_function_does_not_take(project: Path) -> None:
    assert "user_tasks:fail raised TypeError" in refusal("user_tasks:fail", width=3)


def test_bad_fields_keep_the_validators_message(project: Path) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        load_task("quadratic", dimension=0)
    with pytest.raises(ValidationError, match="dimensions"):
        load_task("user_tasks:misspell")
