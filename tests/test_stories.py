"""Stories of small clusters, told as text in `tests/stories/`, acted out in the simulator.

Above the line `---` a story says who takes part and what befalls them; below it, how each round ended and who was left:

    round 3: degraded by 0 1 (2 crashed)           the survivors took their kept contributions' mean
    pair round 1: committed by 0 3; skipped by 1 2      gossip: every pair for itself

To tell what happens now in place of what is written: `python tests/test_stories.py tests/stories/NAME.txt ...`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import cluster, crash

from decentral.config import Run
from decentral.fleet import WorkerGroup
from decentral.journal import Left, Synced
from decentral.naming import part_named
from decentral.outcome import Outcome
from decentral.protocols import RULES, SyncRule
from decentral.sim.simulate import simulate

STORIES = sorted(Path(__file__).parent.joinpath("stories").glob("*.txt"))
NUMBER = r"([\d.]+)"


class Cast:
    """What the lines above `---` have said so far."""

    def __init__(self) -> None:
        self.rule: SyncRule | None = None
        self.options: dict[str, Any] = {"events": [], "latency_s": 0.02, "detection_s": 0.3, "speeds": []}

    def run(self) -> Run:
        assert self.rule is not None, "a story needs a line such as 'diloco with period=5'"
        return cluster(self.rule, **self.options)


def sync(cast: Cast, name: str, fields: str) -> None:
    table: dict[str, Any] = {"name": name}
    for field in fields.split():
        key, _, value = field.partition("=")
        table[key] = int(value) if value.isdigit() else value
    cast.rule = part_named(table, RULES, SyncRule, "rule")


def workers(cast: Cast, count: str, steps: str) -> None:
    cast.options.update(workers=int(count), steps=int(steps))


def speeds(cast: Cast, numbers: str, steps: str) -> None:
    cast.options.update(speeds=[float(number) for number in numbers.split()], steps=int(steps))


def model(cast: Cast, parameters: str) -> None:
    cast.options["task"] = {"name": "quadratic", "dimension": int(parameters)}


def links(cast: Cast, megabits: str, milliseconds: str) -> None:
    bps = float(megabits) * 1e6
    cast.options.update(up_bps=bps, down_bps=bps, latency_s=float(milliseconds) / 1e3)


def crashes(cast: Cast, at: str, ids: str) -> None:
    cast.options["events"] += [crash(float(at), int(worker)) for worker in ids.split()]


def number(option: str, kind: type = float) -> Callable[[Cast, str], None]:
    return lambda cast, text: cast.options.update({option: kind(text)})


SENTENCES: dict[str, Callable[..., None]] = {
    r"(\w+) with (.+)": sync,
    r"(\d+) workers take (\d+) steps of 0\.05 s": workers,
    r"workers of speed ([\d. ]+) take (\d+) steps of 0\.05 s": speeds,
    r"a model of (\d+) parameters": model,
    rf"links of {NUMBER} Mbit/s and {NUMBER} ms": links,
    rf"deaths are noticed after {NUMBER} s": number("detection_s"),
    rf"nobody waits longer than {NUMBER} s": number("patience_s"),
    rf"steps jitter by {NUMBER}": number("jitter"),
    r"seed (\d+)": number("seed", int),
    rf"at {NUMBER} crash ([\d ]+)": crashes,
}


def told(text: str) -> tuple[Run, list[str]]:
    """Return the run that a story describes, and the ending it expects."""
    above, line, below = text.partition("\n---\n")
    assert line, "a story has a line '---' between what is given and what is expected"
    cast = Cast()
    for sentence in filter(None, (line.partition("#")[0].strip() for line in above.splitlines())):
        for pattern, does in SENTENCES.items():
            if match := re.fullmatch(pattern, sentence):
                does(cast, *match.groups())
                break
        else:
            raise ValueError(f"no story says '{sentence}'; it says {', '.join(SENTENCES)}")
    return cast.run(), below.splitlines()


def ending(outcome: Outcome) -> list[str]:
    """Return how each round ended, as those who were left report it, and who finished."""
    deaths = {record.worker: record.time_s for record in outcome.left() if record.reason == "crashed"}
    by_round: dict[str, list[Synced]] = {}
    for record in outcome.records:  # in order of time, so rounds are told in the order in which they first ended
        if isinstance(record, Synced):
            what = "" if record.channel in ("sync", "fast") else f"{record.channel} "
            by_round.setdefault(f"{what}round {record.round}", []).append(record)
    lines, told_of = [], set[int]()
    for name, records in by_round.items():
        groups = {(record.members, record.outcome) for record in records}
        said = "; ".join(f"{outcome} by {' '.join(map(str, members))}" for members, outcome in sorted(groups))
        ended = max(record.time_s for record in records)
        news = sorted(worker for worker, at in deaths.items() if at <= ended and worker not in told_of)
        told_of.update(news)
        lines.append(f"{name}: {said}" + (f" ({' '.join(map(str, news))} crashed)" if news else ""))
    finished = [record.worker for record in outcome.left() if record.reason == "finished"]
    equal = all(torch.equal(outcome.params[worker], outcome.params[finished[0]]) for worker in finished)
    left = max(record.time_s for record in outcome.records if isinstance(record, Left))
    state = "" if len(finished) == 1 else ", all equal" if equal else ", all different"
    lines.append(f"after {left:.1f} s: {' '.join(map(str, finished))} finished{state}")
    return lines


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    run, expected = told(path.read_text(encoding="utf-8"))
    happened = ending(simulate(run))
    print("\n".join(happened))
    assert happened == expected


def test_a_sentence_that_no_story_says_is_refused() -> None:
    with pytest.raises(ValueError, match="no story says 'at 3 rain'"):
        told("at 3 rain\n---\n")


def test_a_run_has_the_workers_that_the_story_names() -> None:
    run, lines = told("diloco with period=2\nworkers of speed 1 0.5 take 4 steps of 0.05 s  # two\n---\nround 1\n")
    assert run.fleet.workers == (WorkerGroup(), WorkerGroup(speed=0.5))
    assert (run.steps, lines) == (4, ["round 1"])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        story = Path(name).read_text(encoding="utf-8")
        lines = ending(simulate(told(story)[0]))
        Path(name).write_text(story.partition("\n---\n")[0] + "\n---\n" + "\n".join(lines) + "\n", encoding="utf-8")
