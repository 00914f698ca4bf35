"""A run's folder: run.toml, journal.jsonl, model.safetensors, summary.json. Made with the first record, not before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from decentral.config import Run, write_run
from decentral.errors import ConfigError
from decentral.journal import FLUSH_S, JournalWriter, Record, read_journal
from decentral.outcome import Outcome
from decentral.replica import initial_model, load_params
from decentral.task import Task

RUNS = Path("runs")
"""Where folders of runs are made, if nobody says."""


class RunFolder:
    """Writes a run's files into `path`, which must not hold another run's.

    `before`: the records up to the checkpoint that the run of this folder goes on from; None: it begins. With `prompt`
    every record is in the file at once, for checkpoints build on it. Whoever goes through the folder reads the records
    that are in the journal then: no others of them are in memory.
    """

    def __init__(self, path: Path, run: Run, before: Iterable[Record] | None = None, *, prompt: bool = False) -> None:
        self._file = path / "journal.jsonl"
        if self._file.exists() and before is None:
            raise ConfigError(f"--out {path}: there is a run in this folder already; name another one")
        self.path = path
        self._run, self._before, self._prompt = run, before or (), prompt
        self._journal: JournalWriter | None = None

    def write(self, records: Iterable[Record]) -> None:
        """Append records to the journal; the folder and run.toml are made with the first."""
        if self._journal is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--out {self.path}: cannot make the folder: {error.strerror}") from error
            write_run(self._run, self.path / "run.toml")
            self._journal = JournalWriter(self._file, self._before, flush_s=0.0 if self._prompt else FLUSH_S)
        self._journal.write(records)

    def __iter__(self) -> Iterator[Record]:
        if self._journal is not None:
            self._journal.flush()
        return read_journal(self._file) if self._file.exists() else iter(())

    def go_back(self, before: Iterable[Record]) -> None:
        """Have the journal hold these records alone: those after them will be made once more."""
        self.close()
        self._before, self._journal = before, None

    def finish(self, outcome: Outcome, task: Task, summary: dict[str, Any]) -> None:
        """Write the checkpoint (when there are parameters) and the summary."""
        if outcome.params:
            save_file(checkpoint(outcome, task, self._run.seed), self.path / "model.safetensors")
        self._summarize(summary)

    @property
    def begun(self) -> bool:
        """Whether there is anything in the folder."""
        return self._journal is not None

    def stop(self, reason: str) -> None:
        """Say in the summary why the run did not come to its end; nothing, if it had not begun."""
        if self.begun:
            self._summarize({"stopped": reason})

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _summarize(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2) + "\n"
        (self.path / "summary.json").write_text(text, encoding="utf-8")


def checkpoint(outcome: Outcome, task: Task, seed: int) -> dict[str, Tensor]:
    """Return the merged model's state dict, ready for `task.model().load_state_dict(...)`.

    Buffers (running statistics) are those of the initial model: they are each replica's own and are not merged.
    """
    model = initial_model(task, seed)
    load_params(model, outcome.merged())
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def new_folder(run: Run, base: Path, use: str) -> Path:
    """Return a fresh folder name below `base`: when, what for, which rule."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{use}-{run.rule.spelling().replace(':', '.')}"
    path, count = base / stem, 1
    while path.exists():
        count += 1
        path = base / f"{stem}-{count}"
    return path
