"""Real runs that go wrong: each ends in one clear error or goes on without the dead, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import ray.util

from decentral.config import Run, validated
from decentral.errors import RunError, TaskError
from decentral.journal import Joined, Left, Metered, Record, Synced, Trained
from decentral.workers import cluster
from decentral.workers.job import NAMESPACE, too_few_left
from decentral.workers.launch import train

FAULTY = "tests.workers.faulty_tasks:Faulty"


@pytest.fixture
def clean(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Whatever the test does, none of its actors may be left afterwards, and no ledger."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(temporary.glob("*.ledger*")) == []
    deadline = time.monotonic() + 10
    while (left := actors()) and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert left == []


def actors() -> list[str]:
    found: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)  # type: ignore[no-untyped-call]
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def run_of(
    fault: str = "", *, workers: int = 2, steps: int = 20, real: dict[str, Any] | None = None, **task: Any
) -> Run:
    return validated(
        {
            "steps": steps,
            "batch_size": 1,
            "task": {"name": FAULTY, "fault": fault, **task},
            "rule": {"name": "diloco", "period": 5, "codec": "int8"},
            "inner": {"name": "sgd", "lr": 0.1},
            "fleet": {"workers": [{"count": workers}]},
            "real": real or {},
        },
        "test",
    )


def pid_of(folder: Path, worker: int) -> int:
    return int((folder / str(worker)).read_text())


# Tasks that fail.


@pytest.mark.usefixtures("clean")
def test_a_task_error_ends_the_run_in_its_own_words() -> None:
    records: list[Record] = []
    with pytest.raises(TaskError) as caught:
        train(run_of("raises", at=7), on_record=records.append)
    assert str(caught.value).startswith("worker 1: the task raised at local step 7: ValueError: no such batch")
    assert type(caught.value) is TaskError
    mine = [record for record in records if record.worker == 1 and not isinstance(record, Metered)]
    assert [type(record) for record in mine] == [Joined, Trained, Synced, Left]
    assert isinstance(mine[-1], Left)
    assert mine[-1].reason == "failed: ValueError"  # nobody has taken it for dead


@pytest.mark.usefixtures("clean")
def test_workers_that_start_from_different_weights_are_refused() -> None:
    with pytest.raises(RunError, match="start from different weights"):
        train(run_of("unequal"))


# Workers that die.


@pytest.mark.usefixtures("clean")
def test_survivors_of_a_sigkill_go_on_and_stay_bit_identical(tmp_path: Path) -> None:
    records: list[Record] = []

    def see(record: Record) -> None:
        records.append(record)
        if isinstance(record, Synced) and record.worker == 1 and record.round == 2:
            os.kill(pid_of(tmp_path, 1), signal.SIGKILL)

    outcome = train(run_of("hangs", at=12, workers=3, pids=str(tmp_path)), on_record=see)
    assert records == outcome.records
    assert [(left.worker, left.reason) for left in outcome.left()] == [(0, "finished"), (1, "crashed"), (2, "finished")]
    assert outcome.left()[1].step == 10
    assert sorted(outcome.params) == [0, 2]
    assert outcome.params[0].equal(outcome.params[2])
    assert outcome.slots[0]["anchor"].equal(outcome.slots[2]["anchor"])
    rounds = {record.round: (record.outcome, record.members) for record in records if isinstance(record, Synced)}
    assert rounds == {
        1: ("committed", (0, 1, 2)),
        2: ("committed", (0, 1, 2)),
        3: ("degraded", (0, 2)),
        4: ("committed", (0, 2)),
    }


@pytest.mark.usefixtures("clean")
def test_a_frozen_worker_is_taken_for_dead(tmp_path: Path) -> None:
    """Its neighbour notices, while it has steps to do; the coordinator would, much later."""
    records: list[Record] = []

    def see(record: Record) -> None:
        records.append(record)
        if isinstance(record, Synced) and record.worker == 1 and record.round == 1:
            os.kill(pid_of(tmp_path, 1), signal.SIGSTOP)

    run = run_of("hangs", at=7, workers=2, steps=50, pids=str(tmp_path))
    outcome = train(run.model_copy(update={"patience_s": 2.0}), on_record=see)
    assert [(left.worker, left.reason) for left in outcome.left()] == [(0, "finished"), (1, "stalled")]
    assert outcome.left()[0].step == run.steps
    with pytest.raises(ProcessLookupError):
        wait_for_death(pid_of(tmp_path, 1))


def wait_for_death(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        os.kill(pid, 0)
        threading.Event().wait(0.05)


@pytest.mark.usefixtures("clean")
def test_a_run_whose_workers_all_die_says_so() -> None:
    with pytest.raises(RunError, match="no worker is left; worker 0: crashed"):
        train(run_of("exits", at=3, worker=0, workers=1))


@pytest.mark.parametrize(
    ("least", "words"),
    [(None, "no worker is left"), (3, "2 workers are left, fewer than real.min_workers = 3")],
)
def test_a_run_with_too_few_workers_for_too_long_says_how_many_it_wants(least: int | None, words: str) -> None:
    run = run_of(real={"min_workers": least, "start_timeout_s": 7.0})
    assert too_few_left(run, 2 if least else 0) == f"{words}, and for real.start_timeout_s = 7 s no other has come"


# The driver.


@pytest.mark.usefixtures("clean")
def test_an_interrupt_leaves_no_actor_and_loses_no_record() -> None:
    records: list[Record] = []

    def see(record: Record) -> None:
        records.append(record)
        if isinstance(record, Trained) and (record.worker, record.step) == (1, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run_of(steps=2000), on_record=see)
    assert sorted(record.worker for record in records if isinstance(record, Joined)) == [0, 1]
    for worker in (0, 1):
        steps = [record.step for record in records if isinstance(record, Trained) and record.worker == worker]
        assert steps
        assert steps == list(range(5, 5 * len(steps) + 1, 5))


@pytest.mark.usefixtures("clean")
def test_an_interrupt_that_a_finaliser_has_swallowed_ends_the_run_all_the_same() -> None:
    def see(record: Record) -> None:
        if isinstance(record, Trained):
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(run_of("hangs", at=12, worker=0, workers=1), on_record=see)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SCRIPT = """
import sys
from decentral.journal import Synced
from decentral.workers.launch import train
from tests.workers.test_launch import run_of

def see(record):
    if isinstance(record, Synced):
        print("synced", flush=True)

run = run_of("hangs" if sys.argv[1] == "interrupted" else "", at=12)
outcome = train(run, on_record=see, address=sys.argv[2] or None)
better = outcome.after["loss"] < outcome.before["loss"]
print(sorted(outcome.params), outcome.params[0].equal(outcome.params[1]), better)
"""


def driver(how: str, address: str = "") -> subprocess.Popen[str]:
    """Start a process that trains on the cluster at the address, or on a Ray of its own whatever RAY_ADDRESS says."""
    apart = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ if address else {**apart, "RAY_ADDRESS": "127.0.0.1:1"},
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_process_without_ray_starts_its_own_and_is_quiet_about_it() -> None:
    out, err = driver("undisturbed").communicate(timeout=120)
    assert out.splitlines()[-1] == "[0, 1] True True"
    assert err == ""


@pytest.mark.slow
def test_ctrl_c_ends_a_local_run_with_all_its_processes() -> None:
    process = driver("interrupted")
    assert process.stdout is not None
    with process:
        while process.stdout.readline() != "synced\n":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does it: everybody in the foreground gets it
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # nothing, if it has ended
    assert err.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 10
    while (left := session_of(process.pid)) and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    assert left == []


def session_of(leader: int) -> list[str]:
    """Return the command lines of what still runs in a session; Ray's processes stay in the one they are started in."""
    listed = subprocess.run(["ps", "-e", "-o", "sid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    return [row[1] for row in rows if row[0] == str(leader)]


# Clusters and ports.


@pytest.mark.usefixtures("clean")
def test_a_port_in_use_is_named() -> None:
    with socket.create_server((cluster.host_here(), 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"port {port} .*real\.port"):
            train(run_of(real={"port": port}))


@pytest.mark.usefixtures("clean")
def test_too_few_machines_are_counted() -> None:
    with pytest.raises(RunError, match=r"0 of 2 workers joined .* need 198 CPUs and 0 GPUs, the cluster has 4 CPUs"):
        train(run_of(real={"threads": 99, "start_timeout_s": 1.0}))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_an_unreachable_cluster_is_named(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match=f"no Ray cluster at {address}: a TCP connection failed .*ray status"):
        train(run_of(), address=address)
    assert time.monotonic() - began < 20


def test_what_answers_but_is_no_cluster_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "REACH_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(RunError, match="there does not answer"):
        train(run_of(), address=f"127.0.0.1:{mute.getsockname()[1]}")
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(RunError, match="what listens there is not Ray"):
        train(run_of(), address=f"127.0.0.1:{port}")
    other.stop(None)


@pytest.mark.parametrize("address", ["somewhere", "http://127.0.0.1:10001"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(RunError, match=f"'{address}' is no address of a Ray head node; write host:port"):
        train(run_of(), address=address)


@pytest.mark.usefixtures("clean")
def test_a_cluster_is_used_by_its_address() -> None:
    address = ray.get_runtime_context().gcs_address
    with pytest.raises(RunError, match="Ray is initialised in this process already"):
        train(run_of(), address=address)
    out, err = driver("undisturbed", address).communicate(timeout=120)
    assert (out.splitlines()[-1:], err) == (["[0, 1] True True"], "")
