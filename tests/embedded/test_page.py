"""Every command of docs/your_loop.md that starts something, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LONG_S, WHOLE_LINES, free_address

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"(?:^    .*\n)+", (ROOT / "docs" / "your_loop.md").read_text(), re.MULTILINE)
COMMANDS = [block for block in BLOCKS if "examples/own_loop/train.py" in block]


@pytest.mark.slow
@pytest.mark.parametrize("commands", COMMANDS, ids=["torchrun", "by hand", "apart"])
def test_commands(commands: str) -> None:
    """Two workers start; their models end the same to the last bit, and are right about new points."""
    address = free_address()
    shown = subprocess.run(
        ["bash", "-ec", commands.replace("127.0.0.1:29600", address) + "wait"],
        cwd=ROOT,
        env={
            **os.environ,
            **WHOLE_LINES,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DECENTRAL_SECRET": "of-this-page-alone",
            "PET_MASTER_PORT": str(int(address.rpartition(":")[2]) - 1),  # torchrun's own, which may be taken
        },
        capture_output=True,
        text=True,
        timeout=12 * LONG_S,
    )
    assert shown.returncode == 0, shown.stderr
    words = re.findall(r"worker (\d): (\S+) % of new points are right; sum of the parameters (\S+)", shown.stdout)
    assert sorted(worker for worker, _, _ in words) == ["0", "1"], shown.stderr
    assert len({checksum for _, _, checksum in words}) == 1
    assert all(float(right) > 90 for _, right, _ in words)
