"""The page on limits: what every page says of its own, in one place."""

from __future__ import annotations

import re
from pathlib import Path

from website.links import relinked
from website.nav import ROOT, source_of, written

INTRO = "# Limits\n\nWhat decentral does not do, or not yet, as every page says it of its own.\n"


def limits_page() -> str:
    """Return the sections called "Limits" of all pages that are written by hand, in the order of the navigation."""
    parts = [INTRO]
    for name in written():
        source = source_of(name)
        if text := limits_of(source.read_text(encoding="utf-8")):
            text = relinked(text, source.relative_to(ROOT).as_posix(), "limits.md")
            parts.append(f"## {title_of(source)}\n\nFrom [that page]({name}).\n\n{text}")
    return "\n".join(parts)


def limits_of(page: str) -> str:
    """Return what stands below the page's heading "Limits", "" if it has none."""
    found = re.search(r"^## Limits\n+(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def title_of(path: Path) -> str:
    """Return a page's first heading."""
    found = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else path.stem
