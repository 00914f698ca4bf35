"""Matrices of links as CSV: rows are sources, columns destinations, an empty cell is no figure."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from decentral.errors import ConfigError
from decentral.part import Section

Matrix = dict[tuple[str, str], float]
"""A figure for each ordered pair of sites that has one."""


class Matrices(Section):
    """What joins sites, as CSV files."""

    bps: Path | None = None
    """Bits per second that each pair of workers gets at most."""
    latency_s: Path | None = None
    """Mean one-way latency in seconds."""

    def read(self) -> tuple[Matrix, Matrix]:
        """Return both matrices, empty if unset; raises `ConfigError`."""
        return _read(self.bps, "bps"), _read(self.latency_s, "latency_s")


def _read(path: Path | None, field: str) -> Matrix:
    """Return a file's matrix; the message of a `ConfigError` names the field, the file, the row and the column."""
    if path is None:
        return {}
    where = f"fleet.network.matrices.{field}: {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot read it: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: it is not a text file") from error
    return parse_matrix(text, where)


def parse_matrix(text: str, where: str) -> Matrix:
    """Return the matrix of a text whose first line names the destinations; raises `ConfigError`."""
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows or len(rows[0]) < 2:
        raise ConfigError(f"{where}: the first line must name the destinations, such as source,lab,home")
    columns = [name.strip() for name in rows[0][1:]]
    matrix: Matrix = {}
    for row in rows[1:]:
        source = row[0].strip()
        if len(row) != len(rows[0]):
            raise ConfigError(f"{where}: row '{source}' has {len(row) - 1} cells for {len(columns)} columns")
        for to, cell in zip(columns, row[1:], strict=True):
            if not cell.strip():
                continue
            if (source, to) in matrix:
                raise ConfigError(f"{where}: '{source}' to '{to}' is there twice")
            matrix[source, to] = _positive(cell, f"{where}: row '{source}', column '{to}'")
    return matrix


def _positive(cell: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise ConfigError(f"{where}: expected a number above 0, not '{cell.strip()}'")
    return number
