"""Checkpoints of whole runs: sharded over the workers, written beside training, and never torn.

Coordinator: `Archive`, `Desk`, `make_checkpoint`, `part`. Worker: `keep`. Going on: `newest`, `reopen`,
`load`, `load_spans`, `records_before`.
"""

from __future__ import annotations

from decentral.checkpoint.archive import Archive, Found, load, newest, reopen
from decentral.checkpoint.desk import Abandoned, Cut, Desk, Draft, Order, Uneven
from decentral.checkpoint.keep import DeskLine, keep
from decentral.checkpoint.make import make_checkpoint, part, records_before
from decentral.checkpoint.manifest import Description, File, Manifest
from decentral.checkpoint.settings import Checkpoints
from decentral.checkpoint.spans import Span, load_spans
from decentral.checkpoint.storage import Storage, StorageError
from decentral.checkpoint.threads import in_thread

__all__ = [
    "Abandoned",
    "Archive",
    "Checkpoints",
    "Cut",
    "Description",
    "Desk",
    "DeskLine",
    "Draft",
    "File",
    "Found",
    "Manifest",
    "Order",
    "Span",
    "Storage",
    "StorageError",
    "Uneven",
    "in_thread",
    "keep",
    "load",
    "load_spans",
    "make_checkpoint",
    "newest",
    "part",
    "records_before",
    "reopen",
]
