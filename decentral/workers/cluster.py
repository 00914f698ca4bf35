"""The Ray that a run is on: the one this process has, one at an address, or one started here."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray
import ray.util

from decentral.config import Run
from decentral.errors import RunError
from decentral.workers.tuned import grpc

REACH_S = 10.0
"""Seconds a cluster has to answer at its address."""
CLIENT = "ray://"
"""What the address of a cluster's client server begins with: this process then is none of the cluster's nodes."""


def host_here() -> str:
    """Return the address at which other nodes of the Ray cluster reach this one."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return host


@contextmanager
def on_cluster(run: Run, address: str | None) -> Iterator[None]:
    """Have Ray initialised: as it is, at an address, or started here and shut down at the end."""
    if address is None:
        if ray.is_initialized():
            yield
            return
        with local_ray(run.fleet.size * run.real.threads):
            yield
        return
    with connected(address):
        yield


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to the Ray cluster at the address. Raises `RunError` when it cannot be had."""
    _connect(address)
    with _until_shutdown():
        yield


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray of this process alone, with so many logical CPUs, quiet, and closed to others by a token of its own."""
    with _own_token():
        try:
            _init(address="local", num_cpus=cpus, include_dashboard=False)
        except Exception as error:
            ray.shutdown()
            raise RunError(
                f"Ray could not be started on this machine: {first_line(error)} "
                "Its logs are in /tmp/ray/session_latest/logs; try again when the machine is less busy"
            ) from error
        with _until_shutdown():
            yield


def _connect(address: str) -> None:
    """Connect to a cluster. Ray would try for minutes, or abort the process: so knock first."""
    advice = (
        "check that the cluster runs (`ray status` on its head node), that this machine may reach that port, and that "
        "RAY_AUTH_TOKEN is the cluster's if it wants one"
    )
    if address != "auto":
        host, _, port = address.removeprefix(CLIENT).rpartition(":")
        if not (host and port.isdigit()) or "//" in host:
            raise RunError(
                f"'{address}' is no address of a Ray head node; write host:port, such as 10.0.0.1:6379, "
                "ray://host:port for its client server, such as ray://10.0.0.1:10001, or auto"
            )
        trouble = _knock(host, int(port), client=address.startswith(CLIENT))
        if trouble:
            raise RunError(f"no Ray cluster at {address}: {trouble}; {advice}")
    if ray.is_initialized():
        raise RunError(f"Ray is initialised in this process already: call train without the address {address}")
    try:
        _init(address=address)
    except (Exception, SystemExit) as error:
        ray.shutdown()
        raise RunError(f"no Ray cluster at {address}: {first_line(error)}; {advice}") from None


def _knock(host: str, port: int, client: bool) -> str:
    """Return what speaks against a Ray head node, or its client server, at the address; nothing if it seems one."""
    try:
        socket.create_connection((host.strip("[]"), port), REACH_S / 2).close()
    except OSError as error:
        return f"a TCP connection failed ({error.strerror or error})"
    if client:
        return ""
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=REACH_S / 2, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return "what listens there is not Ray"
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                return "what listens there does not answer"
    return ""


def _init(**options: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


@contextmanager
def _until_shutdown() -> Iterator[None]:
    """Shut Ray down at the end, and keep it from printing: it tells of every death on our standard output."""
    driver: Any = ray._private.worker
    prints = getattr(driver, "print_to_stdstream", None)
    driver.print_to_stdstream = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        ray.shutdown()
        driver.print_to_stdstream = prints


@contextmanager
def _own_token() -> Iterator[None]:
    """Ray listens on every interface: unless the user has decided otherwise, let in only who has this run's token."""
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    _reread_token()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _reread_token()


def _reread_token() -> None:
    """Ray reads the environment once, when it is imported. Versions before tokens have nothing to read."""
    raylet: Any = ray._raylet
    with suppress(AttributeError):
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def resources() -> dict[str, float]:
    """Return what the cluster has of each resource, other jobs' included."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says anything."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def heeding_interrupts() -> Iterator[Callable[[], None]]:
    """Yield what raises `KeyboardInterrupt` if the user has pressed Ctrl-C and nobody has noticed.

    An interrupt that comes while Ray frees an object is lost in its finaliser, and the run would go on.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = threading.Event()

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    def heed() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
