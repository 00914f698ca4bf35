"""What must hold of rounds that everybody settles, whatever befell the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from decentral.journal import Record, Synced
from tests.chaos.witness import Sight


def require_agreement(records: Iterable[Record], sights: Iterable[Sight]) -> int:
    """Require that a round was one thing to all, and left everybody with the same bits unless it was skipped.

    A worker that was given up while it lived is told that its round is skipped, rests once more and ends: that rest is
    left out, and known by being its last and by the missing record. Return how many rounds came to a mean.
    """
    said: dict[int, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    held: dict[int, set[int]] = defaultdict(set)
    survived: set[tuple[int, int]] = set()
    for record in records:
        if isinstance(record, Synced):
            said[record.round].add((record.outcome, record.members))
            survived.add((record.worker, record.round))
    for sight in sights:
        if not sight.is_last or (sight.worker, sight.round) in survived:
            held[sight.round].add(sight.digest)
    assert {number: words for number, words in said.items() if len(words) > 1} == {}
    settled = [number for number, words in said.items() if next(iter(words))[0] != "skipped"]
    assert {number: held[number] for number in settled if len(held[number]) > 1} == {}
    return len(settled)
