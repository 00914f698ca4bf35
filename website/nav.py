"""Which pages the site has, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

HOME = "index.md"
NAV: dict[str, tuple[str, ...]] = {
    "Begin": ("start.md", "model.md", "rule.md", "your_loop.md", "launch.md"),
    "Look": ("compare.md", "report.md", "watching.md", "accounts.md", "samples.md"),
    "Plan and simulate": ("plan.md", "fleets.md", "simulator.md", "fidelity.md", "scale.md", "peers.md"),
    "Run": (
        "doctor.md",
        "checkpoints.md",
        "notices.md",
        "heterogeneous.md",
        "pipelines.md",
        "wire.md",
        "security.md",
        "chaos.md",
    ),
    "Reference": ("run_file.md", "rules.md", "codecs.md", "parts.md", "commands.md"),
    "Examples": (),
    "Behind it": ("limits.md", "architecture.md", "decisions.md", "changes.md"),
}
"""The pages below each heading, by their names on the site; examples come by themselves."""
MADE = ("run_file.md", "rules.md", "codecs.md", "parts.md", "commands.md", "limits.md")
"""Pages that are made of the code when the site is built."""
MOVED = {"README.md": HOME, "ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changes.md"}
"""Pages of the site that stand elsewhere in the repository, by where they stand."""
FOLDERS = ("deploy", *sorted(f"examples/{path.name}" for path in (ROOT / "examples").iterdir() if path.is_dir()))
"""Folders of the repository that are pages of the site: their README, and their files."""


def source_of(page: str) -> Path:
    """Return where a page that is written by hand stands, by its name on the site."""
    return ROOT / next((source for source, moved in MOVED.items() if moved == page), f"docs/{page}")


def written() -> list[str]:
    """Return the names of the pages that are written by hand, in the order of the navigation."""
    return [name for name in (HOME, *(name for names in NAV.values() for name in names)) if name not in MADE]


def nav() -> list[Any]:
    """Return the navigation as mkdocs reads it."""
    pages = {heading: list(names) for heading, names in NAV.items()}
    pages["Examples"] = [f"{folder}.md" for folder in FOLDERS]
    return [HOME, *({heading: names} for heading, names in pages.items())]
