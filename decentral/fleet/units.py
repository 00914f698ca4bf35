"""Numbers with a unit, as fleets have them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
