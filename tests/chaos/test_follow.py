"""Reading a journal that is still being written."""

from __future__ import annotations

from pathlib import Path

from decentral.journal import Settled
from tests.chaos.follow import Follower


def test_each_record_comes_once_and_whole(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    records = [Settled(time_s=0.5 * number, worker=0, samples=number) for number in range(1, 4)]
    lines = [record.to_json() + "\n" for record in records]
    follower = Follower(journal)
    assert list(follower.fresh()) == []
    journal.write_text(lines[0] + lines[1][:10])
    assert list(follower.fresh()) == records[:1]
    assert list(follower.fresh()) == []
    journal.write_text("".join(lines))
    assert list(follower.fresh()) == records[1:]
