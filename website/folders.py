"""Pages on folders of the repository: the README, and the files themselves."""

from __future__ import annotations

from pathlib import Path

from website.links import relinked
from website.nav import ROOT
from website.tables import code

LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", "": "text"}
"""What files are shown, by their endings."""


def folder_page(folder: str) -> str:
    """Return the page on a folder: its README if it has one, then its text files as they are."""
    readme = ROOT / folder / "README.md"
    page = f"# {folder}\n\nThe files as they stand in the repository.\n"
    if readme.is_file():
        page = relinked(readme.read_text(encoding="utf-8"), f"{folder}/README.md", f"{folder}.md") + "\n## Files\n"
    return page + "".join(_file(path.relative_to(ROOT).as_posix()) for path in _files(folder))


def _files(folder: str) -> list[Path]:
    """Return what is shown of a folder: its files, those above the folders in it, without READMEs."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    shown = (path for path in found if path.suffix in LANGUAGES and path.stat().st_size)
    return sorted(shown, key=lambda path: (len(path.parts), path.name))


def _file(path: str) -> str:
    language = LANGUAGES[Path(path).suffix]
    return f"\n### {code(path)}\n\n~~~~{language}\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n~~~~\n"
