"""Curves for TensorBoard and W&B: what is written is read back, by TensorBoard itself and from W&B's file."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decentral.errors import ConfigError
from decentral.journal import Evaluated, Joined, Record, Synced, Trained
from decentral.watching import TensorBoardWriter, WandbWriter
from decentral.watching.curves import Curves


def synced(worker: int, time_s: float, round_: int, outcome: str, sent_bytes: int) -> Synced:
    return Synced(
        time_s=time_s,
        worker=worker,
        channel="sync",
        round=round_,
        outcome=outcome,
        members=(0, 1),
        sent_bytes=sent_bytes,
    )


RECORDS: list[Record] = [
    Joined(time_s=0.0, worker=0, parameters=3),
    Joined(time_s=0.0, worker=1, parameters=3),
    Trained(time_s=1.0, worker=0, step=10, steps=10, samples=10, seconds=1.0, loss=0.5),
    Trained(time_s=2.0, worker=1, step=10, steps=10, samples=10, seconds=2.0, loss=0.75),
    *[synced(worker, 2.5, 1, "committed", sent_bytes=2**worker) for worker in (0, 1)],
    Evaluated(time_s=2.5, worker=0, step=10, metrics={"loss": 0.25}),
    Trained(time_s=3.5, worker=0, step=20, steps=10, samples=10, seconds=1.0, loss=0.375),
    Trained(time_s=3.5, worker=1, step=20, steps=10, samples=0, seconds=0.0, loss=None),  # missed
    synced(0, 4.0, 2, "skipped", sent_bytes=9),
]


def test_a_round_lasts_from_the_end_of_the_one_before_it() -> None:
    curves = Curves()
    rounds = [
        (point.owner, point.step, point.value)
        for record in RECORDS
        for point in curves.points(record)
        if point.name == "round_seconds/sync"
    ]
    assert rounds == [("worker 0", 10, 2.5), ("worker 1", 10, 2.5), ("worker 0", 20, 1.5)]


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        for record in RECORDS:
            writer.see(record)
    read = {}
    for folder in tmp_path.iterdir():
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            read[folder.name, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
            times = [event.wall_time for event in events.Scalars(tag)]
            if (folder.name, tag) == ("worker-0", "loss"):
                assert times[1] - times[0] == pytest.approx(2.5)  # the run's own time
    assert read == {
        ("worker-0", "loss"): [(10, 0.5), (20, 0.375)],
        ("worker-0", "step_seconds"): [(10, pytest.approx(0.1)), (20, pytest.approx(0.1))],
        ("worker-0", "round_seconds/sync"): [(10, 2.5), (20, 1.5)],
        ("worker-0", "sent_bytes"): [(10, 1.0), (20, 9.0)],
        ("worker-1", "loss"): [(10, 0.75)],
        ("worker-1", "step_seconds"): [(10, pytest.approx(0.2))],
        ("worker-1", "round_seconds/sync"): [(10, 2.5)],
        ("worker-1", "sent_bytes"): [(10, 2.0)],
        ("held-out", "loss"): [(10, 0.25)],
    }


def test_wandb_keeps_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    with WandbWriter("a-project", folder=tmp_path, table={"steps": 20}) as writer:
        for record in RECORDS:
            writer.see(record)
    wandb.teardown()  # its own process is only told to finish, and writes when we have gone on: wait for its end
    [file] = tmp_path.rglob("*.wandb")
    assert logged(file) == {
        ("worker 0/loss", "10", "0.5"),
        ("worker 0/loss", "20", "0.375"),
        ("worker 0/step_seconds", "10", "0.1"),
        ("worker 0/step_seconds", "20", "0.1"),
        ("worker 0/round_seconds/sync", "10", "2.5"),
        ("worker 0/round_seconds/sync", "20", "1.5"),
        ("worker 0/sent_bytes", "10", "1"),
        ("worker 0/sent_bytes", "20", "9"),
        ("worker 1/loss", "10", "0.75"),
        ("worker 1/step_seconds", "10", "0.2"),
        ("worker 1/round_seconds/sync", "10", "2.5"),
        ("worker 1/sent_bytes", "10", "2"),
        ("held-out/loss", "10", "0.25"),
    }


def test_a_missing_extra_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'decentral\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install 'decentral\[wandb\]'"):
        WandbWriter("a-project", folder=tmp_path)


def logged(file: Path) -> set[tuple[str, str, str]]:
    """Return what a W&B file's history says: (key, its owner's step, value), as JSON."""
    from wandb.proto import wandb_internal_pb2 as protocol

    found = set()
    for data in leveldb_records(file.read_bytes()[7:]):  # after the file's own header
        record = protocol.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            owner = next(key for key in items if key.endswith("/step")).removesuffix("/step")
            found |= {
                (key, items[f"{owner}/step"], value)
                for key, value in items.items()
                if key.startswith(owner) and key != f"{owner}/step"
            }
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format: blocks of 32 KiB, the first 7 bytes short; each piece has crc, length
    and kind in front (1: whole; 2, 3, 4: first, middle, last)."""
    at, record = 0, b""
    while at < len(data):
        left_in_block = (1 << 15) - (at + 7) % (1 << 15)
        if left_in_block < 7:
            at += left_in_block
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
