"""The command line as a user meets it, in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from decentral import cli

Command = Callable[..., tuple[int, str, str]]
"""Runs the command with these arguments; returns (exit status, stdout, stderr)."""


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *first: str) -> Command:
    """Return what runs `decentral`, with the arguments `first` before those that it is called with."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["decentral", *first, *arguments])
        try:
            cli.main()
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        assert isinstance(status, int)
        return status, printed.out, printed.err

    return command
