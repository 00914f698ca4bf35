"""Each trouble of a node, caused for real where a test can, and found."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decentral import cli
from decentral.config import Run, validated
from decentral.doctor import sizes
from decentral.doctor.certificates import CertificateFiles
from decentral.doctor.check import Check
from decentral.doctor.checks import CHECKS, judge, look
from decentral.doctor.descriptors import Descriptors
from decentral.doctor.disks import Disks
from decentral.doctor.finding import Finding
from decentral.doctor.gpus import GPUs
from decentral.doctor.memory import Memory, available
from decentral.doctor.ports import Ports
from decentral.doctor.processors import Processors
from decentral.doctor.ray_settings import RaySettings
from decentral.doctor.versions import Versions
from decentral.errors import ConfigError

NODE = "10.0.0.1"


def run_of(**fields: Any) -> Run:
    small = {"task": {"name": "quadratic"}, "inner": {"name": "adamw", "lr": 0.1}}
    return validated({**small, "fleet": {"workers": [{"count": 2}]}, **fields}, "test")


def found(check: Check, run: Run) -> list[Finding]:
    """Return what a check says of this very machine."""
    return list(check.judge({NODE: check.look(run)}, run))


def the_one(check: Check, run: Run) -> Finding:
    (finding,) = found(check, run)
    return finding


def test_each_check_has_a_name_of_its_own_and_something_to_say_of_this_machine() -> None:
    run = run_of()
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    said = list(judge({NODE: look(run)}, run))
    assert {finding.check for finding in said} >= {check.name for check in CHECKS} - {CertificateFiles.name}
    assert all(finding.advice for finding in said if finding.level != "ok")
    json.dumps(look(run))  # it travels


def test_a_port_that_somebody_has_is_a_problem() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        finding = the_one(Ports(), run_of(real={"port": port}))
        assert (finding.level, f"real.port = {port}" in finding.what) == ("problem", True)
        assert "in use" in finding.what
    assert the_one(Ports(), run_of(real={"port": port})).level == "ok"


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real disk of 20 MiB, where the test is."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.undo()
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_is_a_problem_and_what_was_tried_is_gone(small_disk: Path) -> None:
    before = the_one(Disks(), run_of())
    assert before.level == "ok"
    assert list(small_disk.iterdir()) == []
    (small_disk / "full").write_bytes(bytes(10 << 20))
    finding = the_one(Disks(), run_of())
    assert (finding.level, "No space left on device" in finding.what) == ("problem", True)
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_checkpoints_that_do_not_fit_are_a_problem(small_disk: Path) -> None:
    task = {"name": "quadratic", "dimension": 1_000_000}
    run = run_of(task=task, checkpoint={"url": str(small_disk / "kept"), "keep": 2})
    assert sizes.checkpoint_bytes(run) == (3 + 2 * 2) * 4 * 1_000_000  # three vectors, and two moments for each of two
    findings = found(Disks(), run)
    assert [finding.level for finding in findings] == ["problem"] * 2
    assert "checkpoints take about 84 MB" in findings[1].what


def test_a_fleet_that_does_not_fit_into_memory_is_a_problem() -> None:
    run = run_of(task={"name": "byte_gpt", "width": 1 << 15, "depth": 8})
    parameters = 2 * 256 * (1 << 15) + 8 * 12 * (1 << 15) ** 2
    assert sizes.worker_bytes(run) == 5 * 4 * parameters  # parameters, gradients, two moments, one to send
    assert the_one(Memory(), run).level == "problem"
    assert the_one(Memory(), run_of()).level == "ok"


def test_a_model_that_cannot_be_made_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_model.py").write_text(
        "from decentral.tasks import Quadratic\n"
        "class Broken(Quadratic):\n"
        "    def model(self): raise RuntimeError('no weights there')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = the_one(Memory(), run_of(task={"name": "no_model:Broken"}))
    assert (finding.level, finding.what) == ("problem", "the run's model cannot be made: no weights there")


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    kernel = "MemTotal:  4000 kB\nMemAvailable:   3000 kB\n"
    assert available(kernel, tmp_path) == 3000 * 1024
    (tmp_path / "memory.current").write_text("100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available(kernel, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("1100000\n")
    assert available(kernel, tmp_path) == 1_000_000


def test_too_few_open_files_are_a_problem() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    run = run_of(fleet={"workers": [{"count": soft}]})
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
        assert the_one(Descriptors(), run).level == "problem"
        assert the_one(Descriptors(), run_of()).level == "warning"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_threads_than_cores_are_a_warning() -> None:
    cores = len(os.sched_getaffinity(0))
    finding = found(Processors(), run_of(real={"threads": cores}))[0]
    assert (finding.level, finding.what) == ("warning", f"2 workers x {cores} threads share {cores} cores")


def test_a_missing_certificate_is_a_problem(tmp_path: Path) -> None:
    finding = the_one(CertificateFiles(), run_of(real={"certificates": str(tmp_path)}))
    assert (finding.level, str(tmp_path / "ca.pem") in finding.what) == ("problem", True)


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"RAY_TMPDIR": "/tmp/" + "a" * 60}, "set RAY_TMPDIR"), ({"http_proxy": "http://10.1.1.1:3128"}, "no_proxy")],
)
def test_rays_traps_are_told(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str) -> None:
    for name in ("RAY_TMPDIR", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    quiet = [finding.advice for finding in found(RaySettings(), run_of())]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (new,) = [finding.advice for finding in found(RaySettings(), run_of()) if finding.advice not in [*quiet, ""]]
    assert words in new


def test_other_versions_and_unseen_gpus_are_named() -> None:
    """What one machine cannot have: another one beside it, and GPUs that torch is not built for."""
    here = Versions().look(run_of())
    findings = list(Versions().judge({"a": here, "b": {**here, "ray": "2.0", "torch": "1.0"}}, run_of()))
    assert [(finding.level, finding.what.split()[0]) for finding in findings] == [
        ("warning", "torch"),
        ("problem", "ray"),
        ("ok", "python"),
    ]
    assert f"{here['ray']} on a, 2.0 on b" in findings[1].what
    blind = {"driver": 2, "torch": [], "build": "2.13.0+cpu"}
    (finding,) = GPUs().judge({"a": blind}, run_of())
    assert (finding.level, finding.what) == ("problem", "a: the driver has 2 GPUs, torch 2.13.0+cpu sees 0")
    (wanted,) = GPUs().judge({"a": {**blind, "driver": 0}}, run_of(real={"gpus": 1}))
    assert (wanted.level, "the run wants 2 GPUs" in wanted.what) == ("problem", True)


def test_the_command_ends_with_1_for_a_problem_and_says_it_in_json(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    with socket.create_server(("", 0)) as taken:
        run_file.write_text(f'task = {{name = "quadratic"}}\nreal.port = {taken.getsockname()[1]}\n')
        command = [sys.executable, "-m", "decentral.cli", "doctor", str(run_file), "--json"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    findings = json.loads(shown.stdout)
    assert shown.returncode == 1, shown.stderr
    assert [finding["check"] for finding in findings if finding["level"] == "problem"] == ["ports"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peer", "10.0.0.1:1"], "give --secret"),
        (["--address", "auto", "--listen", "0"], "leave out --peer and --listen"),
    ],
)
def test_what_does_not_go_together_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    monkeypatch.delenv("DECENTRAL_SECRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["decentral", "doctor", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == ConfigError.status
    assert words in capsys.readouterr().err
