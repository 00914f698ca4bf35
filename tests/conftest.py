"""Fixtures that all tests share. Its place makes `tests/cluster.py` importable from every folder of tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

torch.set_num_threads(1)  # tests run side by side, one process for each core
# Who is started by a shell's `&` has Ctrl-C ignored, and so has whatever it starts: tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class OneRay(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out the cases of a test function together, and all files that mention `ray_cluster` to one process.

    So there is one Ray at a time, and what cases have in common is worked out once. The scheduler looks through all
    that it has handed out after each test: of single tests there are too many for that.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if _needs_ray(nodeid.partition("::")[0]) else nodeid.partition("[")[0]


@cache
def _needs_ray(file: str) -> bool:
    return "ray_cluster" in (Path(__file__).parent.parent / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    config.option.loadscopereorder = False  # it would go by the number of cases
    return OneRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest does not come last: what needs Ray, then what starts processes or trains in both worlds."""
    long = ("tests/test_", "tests/workers/", "tests/worlds/")

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        return not _needs_ray(item.nodeid.partition("::")[0]), not item.nodeid.startswith(long)

    items.sort(key=turn)


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
