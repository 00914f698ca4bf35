"""Profiles of this machine: a real step, real sockets, and a section that `simulate` takes."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import Slow, named

from decentral import cli, profile
from decentral.config import read_run, validated
from decentral.errors import ConfigError, RunError
from decentral.sim.simulate import simulate
from decentral.workers.pace import Pace
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport

KEYS = Keys("the secret of this test")
PATIENCE_S = 20.0


def test_a_slow_link_is_measured_as_slow_as_it_is() -> None:
    down_bps = 80e6

    async def measured() -> profile.LinkSpeed:
        listener = Transport(
            profile.Discard(),
            keys=KEYS,
            max_packet_bytes=1 << 28,
            patience_s=PATIENCE_S,
            pace=Pace(down_bps=down_bps),
        )
        listener.admit({profile.PROBER: Contact(0, "")})
        try:
            return await profile.measure_link(await listener.start("127.0.0.1"), KEYS, PATIENCE_S)
        finally:
            await listener.close()

    link = asyncio.run(measured())
    assert link.bps == pytest.approx(down_bps, rel=0.1)
    assert 0 < link.latency_s < 0.2


def test_strangers_and_empty_addresses_are_told_apart() -> None:
    async def refusals() -> list[str]:
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(profile.listen("127.0.0.1", 0, KEYS, PATIENCE_S, listening.set_result))
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
            told = []
            for address, keys in ((await listening, Keys("another secret")), (nowhere, KEYS)):
                with pytest.raises(RunError) as caught:
                    await profile.measure_link(address, keys, PATIENCE_S)
                told.append(str(caught.value).removeprefix(address))
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        return told

    stranger, nobody = asyncio.run(refusals())
    assert "does not carry the run's secret" in stranger
    assert "`decentral profile --listen`" in nobody


def test_two_processes_measure_their_link_and_the_section_can_be_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file, written = tmp_path / "run.toml", tmp_path / "fleet.toml"
    run_file.write_text('steps = 20\nrule = "ddp"\ntask = {name = "quadratic"}\n[[fleet.workers]]\ncount = 3\n')
    command = [sys.executable, "-m", "decentral.cli", "profile", str(run_file), "--listen", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as listener:
        try:
            assert listener.stderr is not None
            told = listener.stderr.readline()
            assert told.startswith("on the other machine: decentral profile --peer ")
            options = told.split(" profile ")[1].split()
            cli.app(["profile", str(run_file), *options, "--write", str(written)], standalone_mode=False)
        finally:
            listener.terminate()
    printed = capsys.readouterr()
    assert printed.out == written.read_text()
    assert "down_bps is taken to be the same" in printed.err
    fleet = read_run(written).fleet
    assert fleet.size == 3
    assert fleet.up_bps == fleet.down_bps > 0
    assert fleet.coding_bps is None
    run = read_run(run_file).model_copy(update={"fleet": fleet.model_copy(update={"jitter": 0.0})})
    compute = [record.seconds["compute"] for record in simulate(run, timing_only=True).left()]
    assert compute == pytest.approx([20 * fleet.step_time_s] * 3)


def test_a_peer_needs_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECENTRAL_SECRET", raising=False)
    with pytest.raises(ConfigError, match="profile --peer: give --secret"):
        cli.app(["profile", "--peer", "127.0.0.1:9"], standalone_mode=False)


def test_steps_are_the_runs_own() -> None:
    small, large = (
        profile.measure_steps(read_run(None, ["steps=20", f"batch_size={size}", "task.dimension=20000"], "quadratic"))
        for size in (1, 64)
    )
    assert small.steps >= profile.FEWEST_STEPS
    assert 0 < small.median_s < large.median_s
    assert small.jitter > 0


def test_coding_is_the_rules_codec_and_takes_no_time_where_there_is_none() -> None:
    def coding_bps(*settings: str) -> float | None:
        run = read_run(None, [f"rule.{setting}" for setting in settings], "quadratic")
        return asyncio.run(profile.measure_coding(run))

    assert coding_bps("name=diloco", "codec=float32") is None
    assert coding_bps("name=fedkseed") is None
    fast, slow = coding_bps("name=diloco", "codec=bf16"), coding_bps("name=diloco", "codec=int4")
    assert fast is not None
    assert slow is not None
    assert fast > slow


def test_stages_are_cut_by_what_blocks_take() -> None:
    """The first of six layers takes far longer than its operations count."""
    table = {"task": named(Slow, layers=6), "fleet": {"workers": [{"count": 2}]}, "pipeline": {"stages": 2}}
    run = validated({**table, "batch_size": 4, "steps": 100, "rule": {"name": "local_sgd", "period": 1}}, "test")
    assert run.pipeline.cut(run.make_task(), run.seed, 4).of(0) == [0, 1, 2]
    assert profile.measure_cuts(run) == (1,)


KEEPS = """
import resource
import torch
from decentral import profile
from decentral.config import read_run

profile.measure_steps(read_run(None, ["steps=20"], "quadratic"))
torch.ones(1_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_who_measures_keeps_freed_memory_as_a_worker_does() -> None:
    """In a process of its own: memory is prepared once. Else the kernel would clear each vector's pages anew."""
    done = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 4_000_000  # fewer bytes than one of twenty vectors has
