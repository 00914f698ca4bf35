"""A coordinator that dies at any moment, and goes on from its ledger as if it had not; and what becomes of ledgers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import time
from itertools import pairwise
from pathlib import Path

import msgpack
import pytest
from restarts import Call, Crew, Held

from decentral.workers import ledger
from decentral.workers.ledger import STALE_S, Ledger, remove_stale

CALLS = 120


@pytest.mark.parametrize("seed", range(6))
def test_a_coordinator_that_dies_at_any_write_answers_as_one_that_never_did(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each write of each call: what was not answered is asked again, and everybody is told the same."""
    monkeypatch.setattr(ledger, "TAIL_BYTES", 0)
    now = [100.0]

    async def main() -> None:
        steady = Held(tmp_path / "steady", now)
        crew = Crew(seed, steady)
        for number, call in enumerate(crew.calls(CALLS)):
            now[0] += 1.0
            before = (steady.ledger.versions or [b""])[-1]
            steady.ledger.versions = [before]
            asked = {**{each: call for each, (call, _) in steady.open.items()}, number: call}
            await steady.ask(number, call)
            expected = steady.picture(crew.taken)
            for version in cuts(steady.ledger.versions):
                await die_and_go_on(tmp_path / "other", version, asked, steady, expected, now, crew.taken)
        assert steady.ledger.began_anew > 2
        assert len(steady.coordinator.members.departed) > 3
        await steady.end()

    asyncio.run(main())


def cuts(versions: list[bytes]) -> list[bytes]:
    """Return what is in the file after each write, and in the midst of each that has appended to it."""
    appended = [(before, after) for before, after in pairwise(versions) if after.startswith(before)]
    return versions + [after[: (len(before) + len(after)) // 2] for before, after in appended]


async def die_and_go_on(
    path: Path,
    version: bytes,
    asked: dict[int, Call],
    steady: Held,
    expected: object,
    now: list[float],
    taken: int,
) -> None:
    path.write_bytes(version)
    other = Held(path, now)
    for number, call in asked.items():
        await other.ask(number, call)
    there = set(other.coordinator.members)
    for number, call in asked.items():
        if call.seat is None or call.seat[0] in there:  # who has been declared dead is told so, whatever it asked
            assert other.answers.get(number) == steady.answers.get(number), call
    assert other.picture(taken) == expected
    await other.end()
    path.unlink()


def test_an_entry_torn_at_any_byte_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.ledger"
    entries = [["state", {"much": list(range(300))}], ["vote", 1, None], ["last", "Zürich", -1.5]]
    ends = []
    for entry in entries:
        Ledger(path).append(entry)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = Ledger(path)
        kept = [entry for entry, end in zip(entries, ends, strict=True) if end <= cut]
        assert list(again.entries()) == kept
        again.append(["next"])
        assert list(Ledger(path).entries()) == [*kept, ["next"]]


def test_what_was_being_written_in_the_place_of_all_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.ledger"
    Ledger(path).append(["old"])
    (tmp_path / "run.ledger.new").write_bytes(msgpack.packb(["state", "half"])[:-2])
    again = Ledger(path)
    assert list(again.entries()) == [["old"]]
    assert os.listdir(tmp_path) == ["run.ledger"]
    again.begin_anew(["state", "whole"])
    again.append(["after"])
    assert list(Ledger(path).entries()) == [["state", "whole"], ["after"]]
    assert os.listdir(tmp_path) == ["run.ledger"]


def test_a_ledger_is_as_long_as_what_it_says_and_no_longer(tmp_path: Path) -> None:
    """A million entries pass through; the file never has more than the first one, as much again, and the tail."""
    path = tmp_path / "run.ledger"
    kept = Ledger(path)
    longest = 0
    for number in range(200_000):
        kept.append(["report", number, "x" * 20])
        if kept.is_long:
            longest = max(longest, path.stat().st_size)
            kept.begin_anew(["state", "y" * 3_000_000])
    assert longest < 2 * 3_000_100 + ledger.TAIL_BYTES
    assert path.stat().st_size < 2 * 3_000_100 + ledger.TAIL_BYTES


def test_a_disk_that_is_full_tears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.ledger"
    kept = Ledger(path)
    kept.append(["first"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            kept.append(["second", "does not fit"])
        kept.begin_anew(["state", "does not fit either"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept.append(["third"])
    assert list(Ledger(path).entries()) == [["first"], ["third"]]
    assert os.listdir(tmp_path) == ["run.ledger"]


# What becomes of ledgers.


def test_ledgers_of_runs_that_are_certainly_dead_are_removed(tmp_path: Path) -> None:
    old = time.time() - STALE_S - 60
    for name in ("decentral-dead.ledger", "decentral-dead.ledger.new", "decentral-held.ledger", "somebody.ledger"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "decentral-young.ledger").write_bytes(b"")
    (tmp_path / "decentral-folder.ledger").mkdir()
    (tmp_path / "decentral-link.ledger").symlink_to(tmp_path / "somebody.ledger")
    os.mkfifo(tmp_path / "decentral-pipe.ledger")
    holder = Ledger(tmp_path / "decentral-held.ledger")
    holder.append(["still there"])
    os.utime(tmp_path / "decentral-held.ledger", (old, old))
    remove_stale(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"decentral-dead.ledger", "decentral-dead.ledger.new"}.isdisjoint(left)
    assert {"decentral-held.ledger", "decentral-young.ledger", "somebody.ledger"} <= left


def test_a_ledger_that_began_anew_is_still_held(tmp_path: Path) -> None:
    path = tmp_path / "decentral-held.ledger"
    holder = Ledger(path)
    holder.append(["old"])
    holder.begin_anew(["state"])
    with path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
