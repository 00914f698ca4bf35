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


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        ("decentral", {"torch", "ray", "grpc"}),
        ("decentral.cli", {"ray", "grpc", "cryptography", "matplotlib"}),  # it brings the simulator along
    ],
)
def test_a_room_brings_along_only_what_it_needs(module: str, foreign: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({foreign} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.split() == []
