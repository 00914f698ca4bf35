"""Numbers with a unit, as fleets have them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

HOUR_S = 3600.0
