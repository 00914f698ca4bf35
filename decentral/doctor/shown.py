"""Findings as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from decentral.doctor.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def findings_table(findings: Sequence[Finding]) -> Group:
    """Return a line for each finding, what to do about it below, and a count at the end."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        said = Text(finding.what)
        if finding.advice:
            said.append(f"\n{finding.advice}", style="dim")
        table.add_row(Text(finding.level, style=STYLES[finding.level]), finding.check, said)
    count = Counter(finding.level for finding in findings)
    return Group(table, f"\nproblems: {count['problem']}, warnings: {count['warning']}, ok: {count['ok']}")
