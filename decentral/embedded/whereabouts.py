"""Which worker this process is and where the run's coordinator listens: from arguments, or from the environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from decentral.errors import ConfigError
from decentral.workers.rpc import SECRET_VARIABLE, address_of, checked_secret

ADDRESS_VARIABLE = "DECENTRAL_ADDRESS"
APART_VARIABLE = "DECENTRAL_APART"
OWN = {"worker": "DECENTRAL_WORKER", "workers": "DECENTRAL_WORKERS"}
"""Our own environment variables for the numbers; those that launchers set come after them."""
LAUNCHERS = {"worker": ("RANK", "SLURM_PROCID"), "workers": ("WORLD_SIZE", "SLURM_NTASKS")}
"""Of torchrun, then of Slurm. Where ranks share a replica these number the ranks, not the workers."""

SAME_SECRET = "give all workers the same one"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a call of `join` says of the matter; None: look elsewhere."""

    worker: int | None = None
    workers: int | None = None
    address: str | None = None
    secret: str | None = field(default=None, repr=False)
    host: str | None = None
    apart: bool | None = None

    def check(self) -> None:
        """Raise `ConfigError` for what is wrong whatever the environment says."""
        if self.worker is not None and self.workers is not None:
            _require_numbered(self.worker, self.workers)
        if self.address:
            host_and_port(self.address)
        if self.secret:
            checked_secret(self.secret, SAME_SECRET)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """This is worker `worker` of `workers` and listens on `host`; the coordinator listens at `address` (host, port).

    The coordinator is a process `apart`, or worker 0 serves it.
    """

    worker: int
    workers: int
    address: tuple[str, int]
    secret: str = field(repr=False)
    host: str
    apart: bool = False


def whereabouts(wishes: Wishes, environment: Mapping[str, str], *, fleet: int | None, shared: bool) -> Whereabouts:
    """Return where this worker stands. `fleet` workers are in the run file, if it says so; ranks may be `shared`.

    Raises `ConfigError` for whatever is missing or wrong, which says where it may be given.
    """
    variables = {name: (own, *(() if shared else LAUNCHERS[name])) for name, own in OWN.items()}
    workers = _number("workers", wishes.workers, environment, variables["workers"], fleet)
    if fleet is not None and workers != fleet:
        raise ConfigError(
            f"workers: {workers}, but the run file's fleet has {fleet}; leave [fleet] out of it, or make both the same"
        )
    worker = _number("worker", wishes.worker, environment, variables["worker"], None)
    _require_numbered(worker, workers)
    address = host_and_port(_address(wishes.address, environment, shared))
    secret = wishes.secret or environment.get(SECRET_VARIABLE)
    if secret is None:
        raise ConfigError(
            f"secret: missing; set {SECRET_VARIABLE} to the same secret for all workers, such as "
            "`openssl rand -hex 32` makes, or give join(secret=...)"
        )
    checked_secret(secret, SAME_SECRET)
    apart = _is_apart(wishes.apart, environment)
    return Whereabouts(worker, workers, address, secret, wishes.host or _host_towards(address), apart)


def host_and_port(address: str) -> tuple[str, int]:
    """Return the two parts of "host:port"; raises `ConfigError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"address: '{address}' must be host:port with a port of 1 to 65535, such as 10.0.0.1:29600")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _require_numbered(worker: int, workers: int) -> None:
    if not 0 <= worker < workers:
        raise ConfigError(f"worker: {worker}, but there are {workers} workers, which are numbered 0 to {workers - 1}")


def _number(
    what: str, given: int | None, environment: Mapping[str, str], variables: tuple[str, ...], otherwise: int | None
) -> int:
    if given is not None:
        return given
    for name in variables:
        text = environment.get(name)
        if text is None:
            continue
        if not text.isdigit():
            raise ConfigError(f"{name}: '{text}' must be a whole number of at least 0")
        return int(text)
    if otherwise is None:
        raise ConfigError(f"{what}: missing; give join({what}=...), or set {' or '.join(variables)}")
    return otherwise


def _is_apart(given: bool | None, environment: Mapping[str, str]) -> bool:
    text = environment.get(APART_VARIABLE, "0")
    if text not in ("0", "1"):
        raise ConfigError(
            f"{APART_VARIABLE}: '{text}' must be 1 where `decentral coordinate` serves, or 0 where worker 0 does"
        )
    return text == "1" if given is None else given


def _address(given: str | None, environment: Mapping[str, str], shared: bool) -> str:
    address = given or environment.get(ADDRESS_VARIABLE)
    if address is not None:
        return address
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if host is None or not port.isdigit() or shared:
        raise ConfigError(
            f"address: missing; set {ADDRESS_VARIABLE} to the host:port where worker 0 shall serve the coordinator, or "
            "where one runs, such as 10.0.0.1:29600, or give join(address=...); with torchrun's MASTER_ADDR and "
            "MASTER_PORT it is the port after that, unless ranks share a replica"
        )
    return address_of(host, int(port) + 1)  # torchrun's own store has that one


def _host_towards(address: tuple[str, int]) -> str:
    """Return the address of the interface by which this machine reaches the coordinator."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(place)  # sends nothing
            host: str = way.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"address: '{address_of(*address)}' cannot be reached from here: {error.strerror or error}"
        ) from None
    return host
