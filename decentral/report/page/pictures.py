"""The figures of a page as files of their own: SVG that follows the reader's colours, and PNG on light paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from decentral.errors import ConfigError
from decentral.report.page.course import Course
from decentral.report.page.drawing import Drawing, svg
from decentral.report.page.figure import Figure
from decentral.report.page.folders import ReadRun
from decentral.report.page.html import figures_of, figures_of_all


def write_pictures(runs: Sequence[ReadRun], folder: Path) -> list[Path]:
    """Write each figure of the page as SVG and PNG, named after what it shows; return the files.

    Raises `ConfigError` if the folder cannot be written.
    """
    from decentral.report.page.raster import write_png  # matplotlib takes half a second to import

    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, figure, drawing in _drawings(runs):
            vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
            vector.write_text(svg(drawing, figure.label, alone=True), encoding="utf-8")
            write_png(drawing, pixels)
            written += [vector, pixels]
    except OSError as error:
        raise ConfigError(f"--figures {folder}: cannot write there: {error.strerror or error}") from error
    return written


def _drawings(runs: Sequence[ReadRun]) -> Iterator[tuple[str, Figure, Drawing]]:
    """Yield every drawing with a name for its file: those of a comparison, then each run's."""
    courses = [Course(run) for run in runs]
    groups = [("", figures_of_all(courses))] if len(courses) > 1 else []
    groups += [(_file_name(c.read.name) + "-" if len(courses) > 1 else "", figures_of(c)) for c in courses]
    for prefix, figures in groups:
        for figure in figures:
            for key, drawing in figure.drawings.items():
                if key != "narrow":
                    by = f"-by-{key}" if key not in ("", "wide") else ""
                    yield f"{prefix}{figure.key}{by}", figure, drawing


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
