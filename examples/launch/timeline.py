"""Draw what happened in a run folder.

decentral train examples/launch/run.toml --out runs/launch
python -m examples.launch.timeline runs/launch examples/launch/timeline.png
"""

import sys
from pathlib import Path

from decentral import read_run
from decentral.journal import read_journal
from decentral.report.plots import plot_timeline


def main(folder: Path, picture: Path) -> None:
    run = read_run(folder / "run.toml")
    plot_timeline(read_journal(folder / "journal.jsonl"), run, run.make_task(), picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
