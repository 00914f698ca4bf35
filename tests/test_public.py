"""The names that users import, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import decentral


@pytest.mark.parametrize("name", decentral.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(decentral, name).__doc__
    assert name in dir(decentral)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = decentral.trian  # type: ignore[attr-defined]


SIMULATED = """
import decentral.cli
from decentral.config import validated
from decentral.sim.simulate import simulate

fields = {"task": {"name": "quadratic"}, "rule": {"name": "ddp"}, "fleet": {"workers": [{"count": 2}]}, "steps": 2}
for inner in ("sgd", "adamw", "muon"):
    simulate(validated({**fields, "inner": {"name": inner, "lr": 0.1, "clip_norm": 1}}, "test"))
"""

HELPED = """
from typer.testing import CliRunner
from decentral.cli import app

for words in ([], ["train"], ["compare"]):
    assert "Example: decentral" in CliRunner().invoke(app, [*words, "--help"]).output
"""


@pytest.mark.parametrize(
    ("program", "foreign"),
    [
        ("import decentral", {"torch", "ray", "grpc"}),
        (HELPED, {"torch", "ray", "grpc", "numpy"}),
        # torch's compiler and what it brings along take as long to import as torch does.
        (SIMULATED, {"ray", "grpc", "cryptography", "matplotlib", "torch._dynamo", "sympy", "transformers"}),
    ],
    ids=["the package", "help", "a simulation by the command"],
)
def test_a_process_brings_along_only_what_it_needs(program: str, foreign: set[str]) -> None:
    code = f"{program}\nimport sys; print(*sorted({foreign} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.split() == []
