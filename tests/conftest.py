"""Fixtures that all tests share. Its place makes `tests/cluster.py` importable from every folder of tests."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController
from zygote import forking_ray

torch.set_num_threads(1)  # tests run side by side, a process for each core and one more
# Who is started by a shell's `&` has Ctrl-C ignored, and so has whatever it starts: tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


RAYS = 2
"""Processes that may have a Ray at a time: each has half a GB, and waits about as long as it computes."""


class FewRays(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out the cases of a test function together; files that mention `ray_cluster` whole, and to few processes.

    So each of these starts one Ray, and what cases have in common is worked out once. The scheduler looks through all
    that it has handed out after each test: of single tests there are too many for that.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::" if _needs_ray(nodeid) else "[")[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        """Hand out what comes first; to who is to have no Ray, the first that needs none."""
        if node not in self.nodes[:RAYS]:
            turn = next((scope for scope in self.workqueue if not _needs_ray(scope)), None)
            if turn is not None:
                self.workqueue.move_to_end(turn, last=False)
        super()._assign_work_unit(node)


def _needs_ray(test: str) -> bool:
    return _mentions_ray(test.partition("::")[0])


@cache
def _mentions_ray(file: str) -> bool:
    return "ray_cluster" in (Path(__file__).parent.parent / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FewRays:
    config.option.loadscopereorder = False  # it would go by the number of cases
    return FewRays(config, log)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One process more than there are cores: who waits for a real run needs none."""
    return (yield) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest does not come last: what needs Ray, then what starts processes or trains in both worlds."""
    long = ("tests/test_", "tests/workers/", "tests/worlds/")

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        return not _needs_ray(item.nodeid), not item.nodeid.startswith(long)

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what has come so far, modules and thousands of tests: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One real Ray for all tests of a process that need it: starting one takes seconds."""
    with forking_ray(cpus=4):
        yield
