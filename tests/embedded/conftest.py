"""What tests of trainers share."""

from __future__ import annotations

from typing import Any

import pytest
from processes import free_address


@pytest.fixture
def place() -> dict[str, Any]:
    """Where a worker is that is alone in its run."""
    return {"worker": 0, "workers": 1, "address": free_address(), "secret": "of-these-tests-alone"}
