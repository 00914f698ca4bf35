"""Typed records of a run, one JSON line each. Both worlds write the same ones; tables and plots read either."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, TextIO

from decentral.errors import ConfigError

FLUSH_S = 0.5
"""Seconds of records that may be lost when a run is killed."""


@dataclass(slots=True, kw_only=True)
class Record:
    """A thing that happened at `time_s` seconds into the run (virtual in the simulator) to `worker`.

    Nobody changes a record. The class does not forbid it because frozen ones take three times as long to make, and a
    simulation makes millions.
    """

    kind: ClassVar[str] = ""
    time_s: float
    worker: int

    def to_json(self) -> str:
        template, values = _FORMS[self.kind]
        return template % tuple([_TO_JSON.get(type(value), _encode)(value) for value in values(self)])


@dataclass(slots=True, kw_only=True)
class Joined(Record):
    """The worker entered the run, `parameters` trainable elements in hand: a model's, or a stage's of one."""

    kind: ClassVar[str] = "joined"
    parameters: int
    stage: int = 0


@dataclass(slots=True, kw_only=True)
class Trained(Record):
    """The worker finished local steps up to `step` on `samples` (none of them if these were missed).

    `loss` is their mean (None: not computed). Of a model cut into stages the first one counts the samples, and the last
    one knows the loss.
    """

    kind: ClassVar[str] = "trained"
    step: int
    steps: int
    samples: int
    seconds: float
    loss: float | None


@dataclass(slots=True, kw_only=True)
class Synced(Record):
    """A round of a channel ended for this worker as `outcome`, with the contributions of `members`."""

    kind: ClassVar[str] = "synced"
    channel: str
    round: int
    outcome: str
    members: tuple[int, ...]
    sent_bytes: int


@dataclass(slots=True, kw_only=True)
class Rebuilt(Record):
    """The worker's stage of the model, which nobody held any more, was rebuilt from those of the workers `members`."""

    kind: ClassVar[str] = "rebuilt"
    stage: int
    members: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Leased(Record):
    """The worker has a lease on the samples `start .. stop - 1` of the shared stream; it trains in order of leases."""

    kind: ClassVar[str] = "leased"
    start: int
    stop: int


@dataclass(slots=True, kw_only=True)
class Settled(Record):
    """What the worker trained on the next `samples` samples of its leases can no longer be lost with it alone."""

    kind: ClassVar[str] = "settled"
    samples: int


@dataclass(slots=True, kw_only=True)
class Lost(Record):
    """What the worker trained on the next `samples` samples of its leases was used by nobody: they are leased again."""

    kind: ClassVar[str] = "lost"
    samples: int


@dataclass(slots=True, kw_only=True)
class Refused(Record):
    """The worker has refused `count` frames or contributions of `source` since the last such record, for `code`."""

    kind: ClassVar[str] = "refused"
    source: int
    code: str
    count: int


@dataclass(slots=True, kw_only=True)
class Restored(Record):
    """A newcomer has what was its alone as of that `generation` of parity; None: it has its host's.

    In that case `reason` says why; otherwise it is empty.
    """

    kind: ClassVar[str] = "restored"
    generation: int | None
    reason: str


@dataclass(slots=True, kw_only=True)
class Evaluated(Record):
    """Held-out metrics of the worker's parameters after `step` local steps."""

    kind: ClassVar[str] = "evaluated"
    step: int
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Counterfactual(Record):
    """Held-out metrics of the mean of `members` after `step` local steps: one group's model, or adopted by nobody."""

    kind: ClassVar[str] = "counterfactual"
    step: int
    members: tuple[int, ...]
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Sketched(Record):
    """What local steps have made of the worker's parameters when the run's `number`-th evaluation was due: a sketch.

    Before they meet those of others; how far replicas are apart follows (see `decentral.sketch`).
    """

    kind: ClassVar[str] = "sketched"
    number: int
    sketch: str


@dataclass(slots=True, kw_only=True)
class Spent(Record):
    """The worker has spent the last `seconds` on one `activity`: "compute", "talk", "wait" or "evaluate".

    There for runs alone that are watched so closely. What hides behind computing is computing, as in `Meter`.
    """

    kind: ClassVar[str] = "spent"
    activity: str
    seconds: float


@dataclass(slots=True, kw_only=True)
class Metered(Record):
    """The worker's accounts so far; `loading_s` of computing went into getting batches.

    `sent` is what it has sent since the last such record, large packets alone: (to whom, bytes, seconds on the way).
    There for real runs, and for simulated ones that are watched so closely.
    """

    kind: ClassVar[str] = "metered"
    seconds: dict[str, float]
    loading_s: float
    received_bytes: int
    sent: tuple[tuple[int, int, float], ...]


@dataclass(slots=True, kw_only=True)
class Left(Record):
    """The worker left; `reason` is "finished", "crashed" or what was found out. Its accounts of the whole run."""

    kind: ClassVar[str] = "left"
    reason: str
    step: int
    seconds: dict[str, float]
    sent_bytes: int
    received_bytes: int
    messages_sent: int


_encode = json.JSONEncoder(separators=(",", ":")).encode
_TO_JSON: dict[type, Callable[[Any], str]] = {
    int: str,
    float: lambda value: repr(value) if math.isfinite(value) else _encode(value),
    type(None): lambda value: "null",
}
"""What `_encode` makes of the values that most fields have, four times as fast."""


def _form(cls: type[Record]) -> tuple[str, Callable[[Record], tuple[Any, ...]]]:
    """Return a record's JSON with gaps for its values, and what reads the values from it."""
    names = [field.name for field in dataclasses.fields(cls)]
    gaps = "".join(f',"{name}":%s' for name in names)
    return f'{{"kind":"{cls.kind}"{gaps}}}', attrgetter(*names)


KINDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (
        Joined,
        Trained,
        Synced,
        Rebuilt,
        Leased,
        Settled,
        Lost,
        Refused,
        Restored,
        Evaluated,
        Counterfactual,
        Sketched,
        Spent,
        Metered,
        Left,
    )
}
_FORMS = {kind: _form(cls) for kind, cls in KINDS.items()}


def record_from(fields: dict[str, Any]) -> Record:
    """Return the record that `to_json` wrote as these fields; raises `ConfigError` if there is no such record."""
    values = dict(fields)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(f"unknown journal record {kind!r}; known: {', '.join(KINDS)}")
    if "members" in values:
        values["members"] = tuple(values["members"])
    if "sent" in values:
        values["sent"] = tuple(tuple(each) for each in values["sent"])
    return KINDS[kind](**values)


class JournalWriter:
    """Appends records to a file, a line each, and flushes every `flush_s` seconds.

    A run that is killed leaves all but its last moments; a line that was cut short is left out by `read_journal`.
    """

    def __init__(self, path: Path, before: Iterable[Record] = (), flush_s: float = FLUSH_S) -> None:
        """Begin a file that holds the records `before`; one that is there is replaced when all of these are written."""
        fresh = path.with_name(path.name + ".new")
        self._file: TextIO = fresh.open("w", encoding="utf-8")
        self._flushed, self._flush_s = 0.0, flush_s
        self.write(before)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed = 0.0  # so that the first new record is there at once
        fresh.replace(path)

    def write(self, records: Iterable[Record]) -> None:
        self._file.write("".join(record.to_json() + "\n" for record in records))
        now = time.monotonic()
        if now - self._flushed > self._flush_s:
            self._file.flush()
            self._flushed = now

    def flush(self) -> None:
        """Have all that was written in the file; nothing, when that is closed."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Anew:
    """Records that are read each time somebody goes through them, by calling `read`: nobody keeps them."""

    def __init__(self, read: Callable[[], Iterator[Record]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Record]:
        return self._read()


def read_journal(path: Path) -> Iterator[Record]:
    """Yield the records of a journal file; a torn last line (the writer was killed) is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield record_from(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: not a journal record ({error})") from error
