"""Fixtures that all tests share. Its place makes `tests/cluster.py` importable from every folder of tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

torch.set_num_threads(1)  # tests run side by side, one process for each core


class OneRay(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out tests one by one, but all files that mention `ray_cluster` at once, first, and to one process.

    So there is one Ray at a time, and what takes longest does not come last.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if _needs_ray(nodeid.partition("::")[0]) else nodeid


@cache
def _needs_ray(file: str) -> bool:
    return "ray_cluster" in (Path(__file__).parent.parent / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    return OneRay(config, log)


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what has come so far, modules and thousands of tests: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One real Ray for all tests that need it: starting one takes seconds."""
    from decentral.workers.cluster import local_ray

    with local_ray(cpus=4):
        yield
