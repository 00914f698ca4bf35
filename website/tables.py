"""Markdown, as far as generated pages need it."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, "" if it has no rows; cells are Markdown."""
    lines = [[_cell(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def code(text: str) -> str:
    """Return `text` as inline code."""
    return f"`{text}`"


def escaped(text: str) -> str:
    """Return plain text, with `code` in it, as Markdown that shows it as it is; papers get links."""
    plain, *rest = re.split(r"(`[^`]*`)", text)
    words = [_escaped(plain)]
    for quoted, after in zip(rest[::2], rest[1::2], strict=True):
        words += [quoted, _escaped(after)]
    return "".join(words)


def prose(documented: type) -> str:
    """Return a class's docstring as Markdown: paragraphs, and its indented equations as blocks."""
    lines = inspect.cleandoc(documented.__doc__ or "").splitlines(keepends=True)
    blocks = itertools.groupby(lines, key=lambda line: line.startswith("    "))
    return "".join("".join(block) if indented else escaped("".join(block)) for indented, block in blocks) + "\n"


def gist(documented: type) -> str:
    """Return the first sentence of a class's docstring, in one line of Markdown."""
    paragraph = " ".join(prose(documented).partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def _escaped(text: str) -> str:
    text = re.sub(r"([\\*_\[\]])", r"\\\1", text).replace("<", "&lt;")
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
