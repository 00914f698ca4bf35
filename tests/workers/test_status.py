"""What is known of a run while it goes on: from records made up, from simulated runs, and from real ones."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import socket
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
from cluster import cluster
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from sockets import train_here

from decentral import peer
from decentral.config import Real, Run, validated
from decentral.errors import RunError
from decentral.fleet import WorkerGroup
from decentral.journal import Evaluated, Joined, Left, Metered, Record, Synced, Trained
from decentral.protocols import DDP, DiLoCo, NoLoCo, SyncRule
from decentral.protocols.schedule import Every
from decentral.report.status import status_tables
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch
from decentral.workers import attach
from decentral.workers.coordinator import Coordinator, Entrant
from decentral.workers.coordinator_actor import CoordinatorActor
from decentral.workers.job import NAMESPACE
from decentral.workers.launch import train
from decentral.workers.metrics import metrics_served
from decentral.workers.status import RECENT, ROUNDS, Status, Tally


def status_of(records: list[Record]) -> Status:
    tally = Tally()
    for record in records:
        tally.see(record)
    return tally.status("test")


def joined(worker: int, time_s: float = 0.0) -> Joined:
    return Joined(time_s=time_s, worker=worker, parameters=1)


def trained(worker: int, time_s: float, step: int, steps: int, loss: float | None = 1.0, samples: int = 8) -> Trained:
    return Trained(time_s=time_s, worker=worker, step=step, steps=steps, samples=samples, seconds=steps / 10, loss=loss)


def synced(worker: int, time_s: float, round_: int, outcome: str = "committed", sent_bytes: int = 0) -> Synced:
    return Synced(
        time_s=time_s,
        worker=worker,
        channel="sync",
        round=round_,
        outcome=outcome,
        members=(0, 1),
        sent_bytes=sent_bytes,
    )


def metered(worker: int, time_s: float, received_bytes: int = 0, loading_s: float = 0.0, **seconds: float) -> Metered:
    return Metered(
        time_s=time_s,
        worker=worker,
        seconds={"compute": 0.0, "talk": 0.0, "wait": 0.0, "evaluate": 0.0, **seconds},
        loading_s=loading_s,
        received_bytes=received_bytes,
        sent=(),
    )


def left(worker: int, time_s: float, reason: str) -> Left:
    return Left(
        time_s=time_s,
        worker=worker,
        reason=reason,
        step=9,
        seconds={"compute": 1.0},
        sent_bytes=5,
        received_bytes=6,
        messages_sent=1,
    )


# From records made up.


def test_counters_and_newest_figures_are_what_the_records_say() -> None:
    records = [
        joined(0),
        trained(0, 1.0, 10, 10, loss=3.0),
        synced(0, 2.0, 1, sent_bytes=100),
        trained(0, 3.0, 20, 10, loss=None),
        synced(0, 6.0, 2, "skipped", sent_bytes=250),
        trained(0, 6.5, 25, 5, samples=0),
        Evaluated(time_s=7.0, worker=0, step=25, metrics={"loss": 2.5}),
    ]
    status = status_of(records)
    worker = status["workers"][0]
    assert (worker["step"], worker["steps_done"], worker["samples"], worker["loss"]) == (25, 20, 16, 3.0)
    assert (worker["round_s"], worker["last_round_s"]) == (3.0, 4.0)
    assert worker["round_outcomes"] == {"committed": 1, "skipped": 1}
    assert worker["sent_bytes"] == 250
    assert (status["time_s"], status["members"], status["metrics"], status["over"]) == (7.0, [0], {"loss": 2.5}, False)
    assert [(each["round"], each["outcome"], each["members"]) for each in status["rounds"]] == [
        (1, "committed", [0, 1]),
        (2, "skipped", [0, 1]),
    ]


def test_who_left_is_departed_with_its_reason_until_it_is_back() -> None:
    records: list[Record] = [joined(0), joined(1), left(1, 4.0, "crashed")]
    status = status_of(records)
    assert (status["members"], status["departed"], status["over"]) == ([0], {1: "crashed"}, False)
    again = status_of([*records, joined(1, 9.0)])
    assert (again["members"], again["departed"], again["workers"][1]["incarnation"]) == ([0, 1], {}, 1)
    assert status_of([*records, left(0, 5.0, "finished")])["over"]


def test_shares_are_of_the_recent_time_alone() -> None:
    """An hour of waiting at first is forgotten after `RECENT` accounts of a second each."""
    records: list[Record] = [joined(0), metered(0, 3600.0, wait=3600.0)]
    for second in range(1, RECENT + 1):
        records.append(metered(0, 3600.0 + second, wait=3600.0, compute=0.75 * second, talk=0.25 * second))
    assert status_of(records)["workers"][0]["shares"] == {"compute": 0.75, "talk": 0.25, "wait": 0.0, "evaluate": 0.0}


def test_a_tally_is_no_larger_after_a_long_run() -> None:
    tally, sizes = Tally(), []
    tally.see(joined(0))
    for round_ in range(1, 2001):
        tally.see(trained(0, round_ + 0.5, 10 * round_, 10))
        tally.see(metered(0, round_ + 0.6, compute=float(round_)))
        tally.see(synced(0, round_ + 1.0, round_))
        if round_ % 1000 == 0:
            sizes.append(len(pickle.dumps(tally)))
    assert sizes[1] <= sizes[0] + 16  # longer numbers
    assert len(tally.status("")["rounds"]) == ROUNDS


def test_a_status_is_json_and_has_a_table() -> None:
    status = status_of([joined(0), trained(0, 1.0, 10, 10), synced(0, 2.0, 1), left(0, 3.0, "finished")])
    assert json.loads(json.dumps(status))["workers"] == status["workers"]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(status_tables(status))
    assert "finished" in capture.get()
    assert "committed" in capture.get()


# From simulated runs.


class Unstopped(Tally):
    """A tally that is not told of the end."""

    def see(self, record: Record) -> None:
        if not isinstance(record, Left):
            super().see(record)


def slow_in(rule: SyncRule, seed: int, *last: WorkerGroup) -> dict[int, Any]:
    """Return who is slow, and why, after 45 virtual seconds of four equal, jittery workers and the `last`."""
    run = cluster(
        rule, steps=10_000, seed=seed, task={"name": "quadratic", "dimension": 100_000}, jitter=0.3, up_bps=5e7
    )
    run = run.model_copy(update={"fleet": run.fleet.model_copy(update={"workers": (WorkerGroup(count=4), *last)})})
    tally = Unstopped()
    simulate(
        run, timing_only=True, watch=Watch(spans=True), on_record=tally.see, until=lambda record: record.time_s > 45
    )
    return {worker["worker"]: worker["slow"] for worker in tally.status("")["workers"] if worker["slow"]}


RULES = [DiLoCo(period=Every(period=10)), NoLoCo(period=Every(period=10)), DDP()]
SLOW = WorkerGroup(speed=0.4)
THIN = [WorkerGroup(up_bps=2e6), WorkerGroup(down_bps=2e6), WorkerGroup(up_bps=2e6, down_bps=2e6)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_among_equal_workers_nobody_is_slow(rule: SyncRule, seed: int) -> None:
    assert slow_in(rule, seed, WorkerGroup()) == {}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_slow_device_is_found(rule: SyncRule, seed: int) -> None:
    assert slow_in(rule, seed, SLOW) == {4: "compute"}


@pytest.mark.parametrize("line", THIN, ids=["up", "down", "both"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_thin_line_is_found(rule: SyncRule, line: WorkerGroup) -> None:
    assert slow_in(rule, 0, line) == {4: "link"}


def test_a_slow_device_and_a_thin_line_are_told_apart() -> None:
    assert slow_in(RULES[0], 0, SLOW, THIN[2]) == {4: "compute", 5: "link"}


def test_watching_changes_nothing_else() -> None:
    run = cluster(DiLoCo(period=Every(period=10)), steps=40, jitter=0.1, task={"name": "quadratic", "dimension": 9000})
    plain = simulate(run)
    seen = simulate(run, watch=Watch(spans=True))
    assert [record for record in seen.records if record.kind not in ("spent", "metered", "left")] == [
        record for record in plain.records if record.kind != "left"
    ]
    assert all(seen.params[worker].equal(plain.params[worker]) for worker in plain.params)


# From real runs.


def test_a_real_worker_whose_batches_are_slow_waits_for_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "METER_S", 0.05)
    run = real_run(steps=100, task={"name": "tests.workers.faulty_tasks:Faulty", "fault": "slow"})
    tally = Unstopped()
    for record in train_here(run).records:
        tally.see(record)
    workers = tally.status("")["workers"]
    assert [worker["slow"] for worker in workers] == [None, "storage", None]
    shares = workers[0]["shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["wait"] > 0.5  # for worker 1
    assert workers[0]["received_bytes"] > 0


def real_run(*, task: dict[str, Any], workers: int = 3, steps: int = 20, real: dict[str, Any] | None = None) -> Run:
    return validated(
        {
            "steps": steps,
            "batch_size": 1,
            "task": task,
            "rule": {"name": "diloco", "period": 10},
            "inner": {"name": "sgd", "lr": 0.1},
            "fleet": {"workers": [{"count": workers}]},
            "real": real or {},
        },
        "test",
    )


def test_a_coordinator_says_who_is_in_the_run_and_where() -> None:
    now = [100.0]

    async def main() -> None:
        coordinator = Coordinator(range(2), silence_s=math.inf, clock=lambda: now[0])
        assert coordinator.status("run")["members"] == []
        await asyncio.gather(
            *[coordinator.join(Entrant(worker, 0, f"10.0.0.{worker}:70", 7, 1)) for worker in range(2)]
        )
        for worker in range(2):
            coordinator.report(worker, 0, [{"kind": "joined", "time_s": 0.0, "worker": worker, "parameters": 1}])
        now[0] += 5.0
        coordinator.require_seat(1, 0)
        now[0] += 2.0
        status = coordinator.status("run")
        assert (status["run"], status["time_s"], status["members"], status["epoch"]) == ("run", 7.0, [0, 1], 0)
        assert [(worker["node"], worker["heard_s"]) for worker in status["workers"]] == [
            ("10.0.0.0", 7.0),
            ("10.0.0.1", 2.0),
        ]
        assert status["held_back"] == 2
        coordinator.remove(1, 0, "crashed")
        after = coordinator.status("run")
        assert (after["members"], after["departed"], after["over"]) == ([0], {1: "crashed"}, False)

    asyncio.run(main())


def test_a_running_job_answers_and_serves_its_metrics(ray_cluster: None, tmp_path: Path) -> None:
    """All is asked when both workers have reported the first round, before the gate to the second is opened."""
    with pytest.raises(RunError, match="no run is on this cluster now"):
        attach.the_run(None)
    port, gate = free_port(), tmp_path / "gate"
    rounds: list[Synced] = []
    seen: dict[str, Any] = {}

    def see(record: Record) -> None:
        rounds.extend([record] if isinstance(record, Synced) else [])
        if len(rounds) == 2 and not seen:
            name = attach.the_run(None)
            actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)  # type: ignore[no-untyped-call]
            seen.update(name=name, status=attach.ask(name), metrics=scraped(port), actors=actors)
            gate.touch()

    task = {"name": "tests.workers.faulty_tasks:Gated", "at": 10, "gate": str(gate)}
    outcome = train(real_run(workers=2, task=task, real={"metrics_port": port}), on_record=see)
    name, status, metrics = seen["name"], seen["status"], seen["metrics"]
    sent_bytes = {str(record.worker): record.sent_bytes for record in rounds if record.round == 1}
    assert {actor["name"] for actor in seen["actors"]} == {
        f"{name}-{actor}" for actor in ("coordinator", "worker-0", "worker-1")
    }
    assert (status["run"], status["members"], status["over"]) == (name, [0, 1], False)
    assert [(worker["state"], worker["step"], worker["samples"]) for worker in status["workers"]] == [
        ("training", 10, 10)
    ] * 2
    assert all(worker["node"] and worker["heard_s"] < 60 for worker in status["workers"])
    assert [(each["round"], each["outcome"]) for each in status["rounds"]] == [(1, "committed")]
    for worker in ("0", "1"):
        assert metrics["decentral_worker_up", (worker,)] == 1.0
        assert metrics["decentral_steps_total", (worker,)] == 10.0
        assert metrics["decentral_samples_total", (worker,)] == 10.0
        assert metrics["decentral_rounds_total", ("committed", worker)] == 1.0
        assert metrics["decentral_sent_bytes_total", (worker,)] == sent_bytes[worker]
    assert attach.ask(name) is None  # it is over
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with pytest.raises(RunError, match=f"--run {name}: no such run is on this cluster; running: none"):
        attach.the_run(name)
    assert sorted(outcome.params) == [0, 1]


def test_metrics_on_a_port_that_is_taken_end_the_run_in_one_message() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(RunError, match=rf"real\.metrics_port = {port} on 127\.0\.0\.1: cannot be listened on"),
            metrics_served(Real(metrics_port=port), None),
        ):
            pass


def test_of_several_jobs_one_must_be_named(ray_cluster: None, tmp_path: Path) -> None:
    """The coordinators are real ones that nobody has started, so that they cannot answer either."""
    names = ("decentral-a-coordinator", "decentral-b-coordinator", "decentral-b-coordinator-life-1")
    actor = ray.remote(CoordinatorActor)
    actors = [
        actor.options(name=name, namespace=NAMESPACE, num_cpus=0).remote({}, "", "", tmp_path / "ledger", None)
        for name in names
    ]
    try:
        assert attach.runs() == {"decentral-a": names[0], "decentral-b": names[2]}  # b's first one has died
        with pytest.raises(RunError, match="2 runs are on this cluster: decentral-a, decentral-b; name one"):
            attach.the_run(None)
        assert attach.the_run("decentral-b") == "decentral-b"
        with pytest.raises(RunError, match="the coordinator of decentral-b does not answer"):
            attach.ask("decentral-b")
    finally:
        for each in actors:
            ray.kill(each)


def scraped(port: int) -> dict[str, Any]:
    """Return what Prometheus would read: values by metric and label values, in the order of the labels' names."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
