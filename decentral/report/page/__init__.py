"""A run, or several compared, as one self-contained HTML page."""

from decentral.report.page.folders import ReadRun, read_runs
from decentral.report.page.html import page
from decentral.report.page.pictures import write_pictures

__all__ = ["ReadRun", "page", "read_runs", "write_pictures"]
