"""Workers of one kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from decentral.fleet.devices import DTYPES, Dtype, device_named
from decentral.fleet.prices import Price
from decentral.fleet.units import HOUR_S, PositiveNumber, Seconds
from decentral.part import Section

DeviceName = Annotated[str, AfterValidator(lambda name: device_named(name) and name)]


class Slowing(Section):
    """A machine that wears out: from `from_s` on its speed falls linearly, down to a floor."""

    from_s: Seconds = 0.0
    """When it begins, in seconds after the start."""
    per_hour: PositiveNumber
    """Share of its first speed that it loses in an hour."""
    floor: float = Field(gt=0, le=1)
    """Share of its first speed that is left in the end."""

    @property
    def ends_s(self) -> float:
        """When the floor is reached, in seconds after the start."""
        return self.from_s + (1 - self.floor) * HOUR_S / self.per_hour


class Stalls(Section):
    """Pauses in which a machine computes nothing; between two of them lies an exponential time."""

    per_hour: float = Field(gt=0, le=10 * HOUR_S)
    """How many, on average, in an hour of not pausing."""
    duration_s: PositiveNumber
    """How long each of them takes, in seconds."""


class WorkerGroup(Section):
    """Some workers of one kind."""

    count: int = Field(default=1, ge=1)
    """How many."""
    speed: float = Field(default=1.0, gt=0, le=1)
    """Local steps a second, relative to the fastest worker, or to what `device` or `step_time_s` say."""
    device: DeviceName | None = None
    """Simulated: the machine, such as "A100-80" (see `decentral.fleet.devices`); its peak and `mfu` give the step time,
    and a model that does not fit into its memory is refused."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Simulated: share of the device's peak that training reaches: for large models on GPUs often 0.3 to 0.5."""
    dtype: Dtype | None = None
    """Simulated: the number format of the device's matrix products, whose peak counts; unset: "float32"."""
    step_time_s: PositiveNumber | None = None
    """Simulated: seconds of a local step as measured (`decentral profile`); unset: the device's, or the fleet's."""
    jitter: float | None = Field(default=None, ge=0, le=2)
    """Simulated: sigma of a log-normal factor, of mean 1, on each local step's time; the fleet's if unset."""
    coding_bps: PositiveNumber | None = None
    """Simulated: bits of float32 that these workers encode, decode or merge in a second; unset: the fleet's."""
    slowing: Slowing | None = None
    """Simulated: how the machines' speed falls; unset: it does not."""
    stalls: Stalls | None = None
    """Simulated: pauses, each machine's own; unset: none."""
    start_s: Seconds = 0.0
    """Simulated: when these workers join, in seconds after the start."""
    up_bps: PositiveNumber | None = None
    """Uplink in bits per second; unset: drawn from what a known site's machines have (`decentral.fleet.sites`), or the
    fleet's."""
    down_bps: PositiveNumber | None = None
    """Downlink in bits per second; unset: likewise."""
    site: str | None = None
    """Where they stand; traffic within a site is free of egress. Unset: all such groups stand at one place."""
    dollars_per_hour: Price | None = None
    """What a machine costs while it is rented; unset: what `billing` says, or unknown."""
    billing: Literal["on_demand", "spot"] | None = None
    """Which of the device's list prices counts; unset: none."""
    watts: PositiveNumber | None = None
    """Power that a machine draws while it computes or evaluates; unset: the device's board power, or unknown."""
    idle_watts: PositiveNumber | None = None
    """Power that it draws while it talks and waits; unset: not counted."""

    @property
    def peak_flops(self) -> float:
        """The device's peak at `dtype` in floating-point operations a second; 0 without a device."""
        return device_named(self.device).peak_flops[self.dtype or "float32"] if self.device else 0.0

    @property
    def price(self) -> float | None:
        """Dollars an hour, None if nobody has said."""
        if self.billing is None or self.device is None:
            return self.dollars_per_hour
        device = device_named(self.device)
        return device.spot_dollars_per_hour if self.billing == "spot" else device.dollars_per_hour

    @property
    def power(self) -> float | None:
        """Watts at work, None if nobody has said."""
        return self.watts or (device_named(self.device).watts if self.device else None)

    @model_validator(mode="after")
    def _one_price(self) -> WorkerGroup:
        if self.billing is None:
            return self
        if self.device is None:
            raise ValueError('billing needs a device, such as device = "A100-80"; else give dollars_per_hour')
        if self.dollars_per_hour is not None:
            raise ValueError("billing and dollars_per_hour both say what a machine costs; give one of them")
        if self.price is None:
            raise ValueError(f'device = "{self.device}" has no list price for {self.billing}; give dollars_per_hour')
        return self

    @model_validator(mode="after")
    def _one_step_time(self) -> WorkerGroup:
        if self.device is None:
            for field in ("mfu", "dtype"):
                if getattr(self, field) is not None:
                    raise ValueError(f'{field} needs a device, such as device = "A100-80"')
            return self
        if self.step_time_s is None and self.mfu is None:
            raise ValueError(
                f'device = "{self.device}" needs mfu, the share of its peak that training reaches (such as mfu = 0.4), '
                "or a measured step_time_s"
            )
        if self.step_time_s is not None and self.mfu is not None:
            raise ValueError("mfu and step_time_s both say how long a step takes; give one of them")
        peaks = device_named(self.device).peak_flops
        if (self.dtype or "float32") not in peaks:
            known = ", ".join(dtype for dtype in DTYPES if dtype in peaks)
            raise ValueError(f'device = "{self.device}" has no peak for dtype = "{self.dtype}"; it has {known}')
        return self
