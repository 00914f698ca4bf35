"""An hour of churn: eight workers on a local Ray, one of them killed every minute. What grows or stays behind, leaks.

    python -m soak.churn [--minutes 60] [--seed 0]

The run is one that a user would begin, `decentral train`, with leases and with a checkpoint every minute. Its workers
sleep through most of a step, so that the cores are not what is measured. In every minute one worker is killed (SIGKILL)
and in every third another one is told to leave (SIGTERM); both are replaced. Only the fifth minutes are quiet: in the
second halves of these is seen what pace workers have that nothing befalls. Every ten seconds the memory, threads and
open files of every process of the run are noted.

At the end: by kind of process, how fast memory has grown; goodput, which is the samples that were settled in the other
minutes by those that the workers who were there would have settled at the pace of the quiet ones; the journal verified,
every sample looked for; no process and no file left behind.
"""

from __future__ import annotations

import argparse
import bisect
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decentral.config import Run, validated, write_run
from decentral.coverage import coverage
from decentral.journal import Joined, Left, Record, Settled, Trained, read_journal
from decentral.verify import verify
from soak.processes import Sample, adopt_orphans, descendants, sample
from tests.chaos.follow import Follower

WORKERS = 8
PARAMETERS = 100_000
BATCH = 4
PERIOD = 8
STEP_S = 0.25
BEGIN_S = 120.0
"""Seconds from the first join until the first minute in which somebody is struck."""
MINUTE_S = 60.0
NOTICE_EVERY = 3
"""Minutes between two notices."""
QUIET_EVERY = 5
"""Minutes from a quiet one to the next."""
CALM_S = 60.0
"""Seconds of training before the end in which nobody is struck any more."""
LOOK_S = 10.0
"""Seconds between two looks at all processes."""
WARM_S = 120.0
"""A process younger than this is still filling its memory."""
OURS = ("Worker", "CoordinatorActor", "decentral.cli")
"""Kinds of processes that are not Ray's own."""
GROWTH_SHARE = 0.05
"""By how much of it the memory of a process of ours may grow in an hour."""
GROWTH_FILES = 8
"""How many more threads or open files one of ours may have in the end than when it was warm."""
GOODPUT = 0.95
TORCH = "torchinductor_"
"""What torch's own folder of temporary files is called: it stays for the next process."""
FAREWELL_S = 30.0
"""Seconds until all processes must be gone when the run has ended."""


def run_of(minutes: float, folder: Path) -> Run:
    return validated(
        {
            "steps": round(60 * minutes / STEP_S),
            "batch_size": BATCH,
            "leases": True,
            "evaluate_every": 0,
            "patience_s": 10.0,
            "task": {"name": "tests.chaos.tasks:Paced", "dimension": PARAMETERS, "spread": 0.0, "step_s": STEP_S},
            "inner": {"name": "adamw", "lr": 1e-6},  # so small that there is something left to learn in the end
            "rule": {"name": "diloco", "period": PERIOD, "codec": "int8"},
            "fleet": {"workers": [{"count": WORKERS}]},
            "checkpoint": {"url": str(folder / "checkpoints"), "every_s": MINUTE_S},
        },
        "churn",
    )


# -- the run -----------------------------------------------------------------------------------------------------------


class Churn:
    """Begins the run in `folder`, strikes its workers, and keeps what all its processes took."""

    def __init__(self, minutes: float, folder: Path, seed: int) -> None:
        self.samples: list[Sample] = []
        self.struck: Counter[str] = Counter()
        self.minutes = 0  # that have begun between `BEGIN_S` and `CALM_S`
        self._run, self._folder, self._draw = run_of(minutes, folder), folder, random.Random(seed)
        self._steps_left = self._run.steps
        self._journal = Follower(folder / "out" / "journal.jsonl")
        self._now = 0.0  # of the run

    def run(self) -> int:
        """Return the exit status of `decentral train`."""
        write_run(self._run, self._folder / "run.toml")
        (self._folder / "tmp").mkdir()
        command = ("decentral.cli", "train", str(self._folder / "run.toml"), "--out", str(self._folder / "out"))
        env = {
            **os.environ,
            "TMPDIR": str(self._folder / "tmp"),
            "RAY_TMPDIR": str(self._folder / "ray"),
            "RAY_worker_niceness": "0",  # Ray's workers give way to everybody else, which looks like stalls
        }
        with (self._folder / "out.log").open("wb") as log:
            training = subprocess.Popen(
                [sys.executable, "-m", *command, "--json"], env=env, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                self._watch(training)
            finally:
                training.kill()
        return training.wait()

    def _watch(self, training: subprocess.Popen[bytes]) -> None:
        coming: list[tuple[float, signal.Signals]] = []
        while training.poll() is None:
            self.samples += [found for pid in descendants() if (found := sample(pid, time.monotonic()))]
            looked = time.monotonic()
            while time.monotonic() < looked + LOOK_S and training.poll() is None:
                time.sleep(0.1)
                self._look()
                if self._now > BEGIN_S + self.minutes * MINUTE_S and self._steps_left * STEP_S > CALM_S:
                    coming += self._next_minute()
                for strike in [strike for strike in coming if strike[0] < self._now]:
                    coming.remove(strike)
                    self._strike(strike[1])

    def _look(self) -> None:
        for record in self._journal.fresh():
            self._now = max(self._now, record.time_s)
            if isinstance(record, Trained):
                self._steps_left = min(self._steps_left, self._run.steps - record.step)

    def _next_minute(self) -> Iterator[tuple[float, signal.Signals]]:
        """Yield what is to happen in the next minute, and when."""
        self.minutes += 1
        begin_s = BEGIN_S + (self.minutes - 1) * MINUTE_S
        if _is_quiet(self.minutes):
            return
        yield begin_s + self._draw.uniform(0, MINUTE_S), signal.SIGKILL
        if self.minutes % NOTICE_EVERY == 0:
            yield begin_s + self._draw.uniform(0, MINUTE_S), signal.SIGTERM

    def _strike(self, number: signal.Signals) -> None:
        newest = max(found.at_s for found in self.samples)
        workers = [found.pid for found in self.samples if found.kind == "Worker" and newest - found.at_s < LOOK_S / 2]
        try:
            os.kill(self._draw.choice(workers), number)
        except ProcessLookupError:
            return  # it has ended since we looked
        self.struck[number.name] += 1


def _is_quiet(minute: int) -> bool:
    return minute % QUIET_EVERY == 0


# -- what came of it ---------------------------------------------------------------------------------------------------


def growth(samples: Iterable[Sample]) -> float:
    """Return by how many bytes a second processes of one kind grow, each seen against its own mean; by least squares.

    nan if none of them was there for long enough.
    """
    lives: defaultdict[int, list[Sample]] = defaultdict(list)
    for found in samples:
        lives[found.pid].append(found)
    above = below = 0.0
    for life in lives.values():
        warm = [found for found in life if found.at_s - life[0].at_s > WARM_S]
        if len(warm) < 2:
            continue
        at_s, resident = (
            statistics.fmean(column) for column in zip(*[(f.at_s, f.resident) for f in warm], strict=True)
        )
        above += sum((found.at_s - at_s) * (found.resident - resident) for found in warm)
        below += sum((found.at_s - at_s) ** 2 for found in warm)
    return above / below if below else math.nan


def more(samples: Sequence[Sample], field: str) -> int:
    """Return how many more of `field` any one process had at its end than when it was warm."""
    lives: defaultdict[int, list[Sample]] = defaultdict(list)
    for found in samples:
        lives[found.pid].append(found)
    warm = [[getattr(f, field) for f in life if f.at_s - life[0].at_s > WARM_S] for life in lives.values()]
    tails = [(values[: len(values) // 4 + 1], values[-(len(values) // 4 + 1) :]) for values in warm if values]
    return max((round(statistics.median(late) - statistics.median(early)) for early, late in tails), default=0)


Span = tuple[float, float]
"""From when until when, in seconds of the run."""


def goodput(records: Sequence[Record], minutes: int) -> float:
    """Return the pace in the first so many minutes, the quiet ones left out, by that in the latter halves of these."""
    spans = {minute: (BEGIN_S + (minute - 1) * MINUTE_S, BEGIN_S + minute * MINUTE_S) for minute in range(1, minutes)}
    quiet = [(end - MINUTE_S / 2, end) for minute, (_, end) in spans.items() if _is_quiet(minute)]
    return pace(records, [span for minute, span in spans.items() if not _is_quiet(minute)]) / pace(records, quiet)


def pace(records: Sequence[Record], spans: Iterable[Span]) -> float:
    """Return how many samples were settled for each second that a worker was there, in these spans.

    A span is moved back to where samples were last settled, so that rounds are in it as a whole or not at all.
    """
    times = sorted(record.time_s for record in records if isinstance(record, Settled))
    moved = [(_last(times, begin), _last(times, end)) for begin, end in spans]
    settled = sum(
        record.samples
        for record in records
        if isinstance(record, Settled) and any(begin < record.time_s <= end for begin, end in moved)
    )
    present, since = 0.0, dict[int, float]()
    for record in records:
        if isinstance(record, Joined):
            since[record.worker] = record.time_s
        elif isinstance(record, Left):
            begin = since.pop(record.worker)
            present += sum(max(0.0, min(record.time_s, high) - max(begin, low)) for low, high in moved)
    return settled / present


def _last(times: list[float], until: float) -> float:
    return times[max(0, bisect.bisect_right(times, until) - 1)]


def left_behind(folder: Path) -> list[str]:
    """Return the processes and temporary files that the run has left, when they have had time to go."""
    until = time.monotonic() + FAREWELL_S
    while (there := [found for pid in descendants() if (found := sample(pid, 0.0))]) and time.monotonic() < until:
        time.sleep(1.0)
    return [f"process {found.pid} ({found.kind})" for found in there] + [
        str(path) for path in folder.glob("tmp/*") if not path.name.startswith(TORCH)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="churn-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        churn = Churn(options.minutes, folder, options.seed)
        status = churn.run()
        if status:
            sys.exit((folder / "out.log").read_text())
        troubles = [f"left behind: {what}" for what in left_behind(folder)]
        records = list(read_journal(folder / "out" / "journal.jsonl"))
        troubles += report(churn, records)
    if troubles:
        sys.exit("\n".join(troubles))


def report(churn: Churn, records: list[Record]) -> list[str]:
    """Print what the run took and came to; return what should not be."""
    verify(records)
    troubles = []
    table = Table("process", "lives", "MB", "MB an hour more", "threads", "more", "files", "more")
    for kind in sorted({found.kind for found in churn.samples}):
        of_kind = [found for found in churn.samples if found.kind == kind]
        resident = statistics.median(found.resident for found in of_kind)
        hourly = 3600 * growth(of_kind)
        threads, files = more(of_kind, "threads"), more(of_kind, "files")
        counts = (statistics.median(f.threads for f in of_kind), statistics.median(f.files for f in of_kind))
        lives = len({found.pid for found in of_kind})
        row = (kind, lives, f"{resident / 1e6:.1f}", f"{hourly / 1e6:+.1f}", f"{counts[0]:g}", threads)
        table.add_row(*map(str, row), f"{counts[1]:g}", str(files))
        if kind not in OURS:
            continue
        if hourly > GROWTH_SHARE * resident:
            troubles.append(f"{kind} grows by {hourly / 1e6:.1f} MB an hour")
        if max(threads, files) > GROWTH_FILES:
            troubles.append(f"{kind} has {threads} threads and {files} files more than when it was warm")
    Console().print(table)
    share = goodput(records, churn.minutes)
    if share < GOODPUT:
        troubles.append(f"goodput is {share:.1%}")
    found = coverage(records)
    missing = sum(stop - start for start, stop in found.missing)
    repeated = sum(repeat.stop - repeat.start for repeat in found.repeated)
    newcomers = sum(isinstance(record, Joined) for record in records) - WORKERS
    reasons = Counter(record.reason for record in records if isinstance(record, Left))
    print(f"struck: {dict(churn.struck)}; {newcomers} newcomers; left: {dict(reasons)}; goodput {share:.1%}")
    print(f"{len(records)} records; of {found.samples} samples {missing} never settled, {repeated} trained on again")
    return troubles


if __name__ == "__main__":
    main()
