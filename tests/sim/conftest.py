"""What tests of the simulator share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scene import Scene


@pytest.fixture
def scenes() -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(*args: Any, **options: Any) -> Scene:
        made.append(Scene(*args, **options))
        return made[-1]

    yield make
    for scene in made:
        scene.loop.close()
