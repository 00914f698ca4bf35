"""The command on machines of a fleet: by Ray on all nodes of a cluster, and by hand on those that listen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
CLUSTER = """
import subprocess, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
command = [sys.executable, "-m", "decentral.cli", "doctor", "run.toml", "--json", "--address", cluster.address]
done = subprocess.run(command)
cluster.shutdown()
sys.exit(done.returncode)
"""
WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from decentral import cli

sys.argv = ["decentral", "doctor", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
def test_every_node_of_a_cluster_is_looked_at_and_visits_the_others(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('task = {name = "quadratic"}\n[[fleet.workers]]\ncount = 2\n')
    command = [sys.executable, "-c", CLUSTER]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=ENVIRONMENT)
    assert shown.returncode == 0, shown.stderr
    findings = json.loads(shown.stdout)
    disks = [finding for finding in findings if finding["check"] == "disks"]
    measured = [finding["what"] for finding in findings if finding["check"] == "links"]
    assert len(disks) == len(measured) == 2
    assert all("Mbit/s" in told for told in measured)
    assert [finding["level"] for finding in findings if finding["check"] == "clocks"] == ["ok"]
    assert any("RAY_AUTH_MODE" in finding["what"] for finding in findings)


def test_who_listens_is_looked_at_from_elsewhere_without_ray(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('task = {name = "quadratic"}\n[[fleet.workers]]\ncount = 2\n')
    command = [sys.executable, "-c", WITHOUT_RAY, "run.toml"]
    with subprocess.Popen([*command, "--listen", "0"], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as there:
        try:
            assert there.stderr is not None
            told = there.stderr.readline()
            options = told.partition(" doctor ")[2].split()
            command += [*options, "--json"]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        finally:
            there.kill()
    assert shown.returncode == 0, shown.stderr + shown.stdout
    findings = json.loads(shown.stdout)
    assert len([finding for finding in findings if finding["check"] == "disks"]) == 2
    (link,) = [finding for finding in findings if finding["check"] == "links"]
    assert link["what"].startswith(f"this machine to {options[1]}: ")
