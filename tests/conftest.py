"""Fixtures that all tests share. Its place makes `tests/cluster.py` importable from every folder of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One real Ray for all tests that need it: starting one takes seconds."""
    from decentral.workers.launch import local_ray

    with local_ray(cpus=4):
        yield
