"""A run in a terminal: live progress, a run folder, a closing table, and Ctrl-C that ends it in good order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console

from decentral.config import Run
from decentral.errors import DecentralError
from decentral.folder import RUNS, RunFolder, new_folder
from decentral.journal import Record
from decentral.outcome import Outcome
from decentral.report.live import LiveView
from decentral.report.summary import summarize, summary_table
from decentral.watching import TensorBoardWriter, WandbWriter


class Shown(NamedTuple):
    """Where else a run's curves are to be seen: in TensorBoard, in a project of Weights & Biases."""

    tensorboard: bool
    wandb: str | None

    def writers(self, run: Run, folder: Path) -> Iterator[TensorBoardWriter | WandbWriter]:
        """Yield what writes them, below the run's folder. Raises `ConfigError` for what is not installed."""
        if self.tensorboard:
            yield TensorBoardWriter(folder / "tensorboard")
        if self.wandb is not None:
            yield WandbWriter(self.wandb, folder=folder, table=run.to_table())


def run_shown(
    run: Run,
    use: str,
    out: Path | None,
    as_json: bool,
    launch: Callable[[Callable[[Record], None], RunFolder], Outcome],
    shown: Shown,
    *,
    before: Iterable[Record] | None = None,
    virtual: bool = False,
) -> Outcome:
    """Run with live progress, and leave a run folder and a closing table."""
    console = Console(stderr=as_json)
    task = run.make_task()
    folder = RunFolder(out or new_folder(run, RUNS, use), run, before, prompt=bool(run.checkpoint.url))
    with ExitStack() as stack:
        stack.callback(folder.close)
        writers = list(shown.writers(run, folder.path))
        for writer in writers:
            stack.callback(writer.close)
        live = stack.enter_context(LiveView(run, console, task.headline, virtual=virtual))

        def see(record: Record) -> None:
            folder.write([record])
            live.see(record)
            for writer in writers:
                writer.see(record)

        for record in before or ():
            live.see(record)
        try:
            outcome = launch(see, folder)
            summary = summarize(run, task, outcome)
            folder.finish(outcome, task, summary)
        except KeyboardInterrupt:
            live.__exit__(None, None, None)
            folder.stop("interrupted by Ctrl-C")
            begun = f"the journal so far: {folder.path / 'journal.jsonl'}" if folder.begun else "the run had not begun"
            console.print(f"stopped; {begun}")
            raise typer.Exit(130) from None
        except DecentralError as error:
            folder.stop(str(error))
            raise
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        console.print(summary_table(summary))
        console.print(f"run folder: {folder.path}")
        console.print(f"a page on it: decentral report {folder.path}", soft_wrap=True)
    return outcome
