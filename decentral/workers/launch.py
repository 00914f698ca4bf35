"""The driver of a real run: places workers with Ray, passes their records on, and notices who dies."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import grpc
import ray
import ray.exceptions
import safetensors.torch
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError, DecentralError, RunError
from decentral.journal import Joined, Left, Record, Synced, Trained, record_from
from decentral.outcome import Outcome
from decentral.replica import held_out
from decentral.workers.coordinator import CoordinatorActor, Poll
from decentral.workers.worker import SLOT, Worker

NAMESPACE = "decentral"
"""Ray namespace of the actors; a run's are called `decentral-<run>-coordinator` and `decentral-<run>-worker-<id>`."""

SECRET_VARIABLE = "DECENTRAL_SECRET"
"""Environment variable of the driver with the run's secret; unset: a random one."""
SECRET_LENGTH = 16

POLL_S = 0.5
REACH_S = 10.0
"""Seconds a cluster has to answer at its address."""
ANSWER_S = 30.0
"""Seconds one of our actors has to answer a question."""
RESULT_S = 600.0
"""Seconds a worker has to hand over its parameters."""
FAREWELL_S = 2.0
"""Seconds the coordinator has for the last records when a run is broken off, and killed actors have to be gone."""
SILENCE_S = 15.0
"""A worker that gives no sign of life for so long (or for the run's patience, if that is longer) has stalled."""


def train(run: Run, *, address: str | None = None, on_record: Callable[[Record], None] | None = None) -> Outcome:
    """Train on Ray workers and return what it came to.

    `address` names a Ray cluster ("host:port" or "auto"); None takes the Ray this process has initialised, or starts a
    local one for the run. `on_record` sees every record as it comes. However it ends, no actor is left behind. Raises
    `TaskError` or `ConfigError` as a worker met it, and `RunError` when the cluster cannot be had or nobody is left.
    """
    secret = _secret()
    task = run.make_task()
    before = held_out(task, run.seed)  # first: this is where missing data shows
    with _heeding_interrupts() as heed, _cluster(run, address):
        job = Job(run, secret, on_record, heed)
        try:
            job.start()
            job.supervise()
            job.collect()
        finally:
            job.end()
    outcome = Outcome(job.records, _seconds(job.records), job.params, job.slots, before)
    outcome.after = held_out(task, run.seed, outcome.merged())
    return outcome


class Job:
    """One run's actors and records."""

    def __init__(
        self, run: Run, secret: str, on_record: Callable[[Record], None] | None, heed: Callable[[], None]
    ) -> None:
        self._heed = heed
        self.records: list[Record] = []
        self.params: dict[int, Tensor] = {}
        self.slots: dict[int, dict[str, Tensor]] = {}
        self._run, self._on_record = run, on_record
        self._name = f"decentral-{secrets.token_hex(4)}"
        self._secret = secret
        self._gpus = _gpus_each(run)
        self._coordinator: Any = None
        self._workers: dict[int, Any] = {}
        self._lives: dict[Any, int] = {}
        self._finished: list[int] = []
        self._reasons: dict[int, str] = {}
        self._clock_s = float("inf")
        self._unseen: deque[Record] = deque()

    def start(self) -> None:
        """Place all actors and wait until every worker has joined. Raises `RunError` if one dies or time runs out."""
        run = self._run
        self._coordinator = self._actor(CoordinatorActor, "coordinator", cpus=0, gpus=0).remote(
            list(range(run.fleet.size)), self._secret, run.real.certificates, max(SILENCE_S, run.patience_s)
        )
        address = self._coordinator.start.remote(run.real.port)
        for worker in range(run.fleet.size):
            actor = self._actor(Worker, f"worker-{worker}", cpus=run.real.threads, gpus=self._gpus)
            self._workers[worker] = actor.remote(run.to_table(), worker, 0, self._secret)
        self._lives = {actor.run.remote(address): worker for worker, actor in self._workers.items()}
        _answer(address, ANSWER_S, "the coordinator could not be started")
        deadline = time.monotonic() + run.real.start_timeout_s
        while (joined := self._poll()["joined"]) < run.fleet.size:
            if time.monotonic() > deadline:
                raise RunError(self._too_few(joined))
            ended = self._ended(POLL_S)
            if ended and self._poll()["joined"] < run.fleet.size:
                self._starting_failed(ended[0])

    def supervise(self) -> None:
        """Pass records on until every worker has finished, left or died. Raises what a task or a rule raised."""
        while self._lives:
            ended = self._ended(POLL_S)
            for worker in self._poll()["silent"]:
                self._lost(worker, "stalled")
            for life in ended:
                self._settle(life)
        if not self._finished:
            reasons = "; ".join(f"worker {worker}: {reason}" for worker, reason in sorted(self._reasons.items()))
            raise RunError(f"no worker is left; {reasons}")

    def collect(self) -> None:
        """Fetch parameters and slots of the workers that finished."""
        for worker in self._finished:
            try:
                data = ray.get(self._workers[worker].result.remote(), timeout=RESULT_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                continue  # it died after it had finished; the others have theirs
            tensors = safetensors.torch.load(data)
            self.params[worker] = tensors.pop("params")
            self.slots[worker] = {name.removeprefix(SLOT): tensor for name, tensor in tensors.items()}
        if not self.params:
            raise RunError("every worker died after it had finished; there are no parameters left to return")

    def end(self) -> None:
        """Kill every actor of the run; pass on what records there are, waiting a bounded time."""
        lives = list(self._lives)
        try:
            for actor in self._workers.values():
                ray.kill(actor)
            if self._coordinator is not None:
                with suppress(Exception):
                    self._take(ray.get(self._coordinator.poll.remote(), timeout=FAREWELL_S))
        finally:
            if self._coordinator is not None:
                ray.kill(self._coordinator)
            if lives:
                ray.wait(lives, num_returns=len(lives), timeout=FAREWELL_S)

    # -- what happens to workers -------------------------------------------------------------------------------------

    def _ended(self, timeout_s: float) -> list[Any]:
        if not self._lives:
            return []
        ended: list[Any] = ray.wait(list(self._lives), num_returns=1, timeout=timeout_s)[0]
        return ended

    def _settle(self, life: Any) -> None:
        """A worker's run has ended one way or another."""
        worker = self._lives.get(life)
        if worker is None:
            return
        try:
            reason = ray.get(life)
        except ray.exceptions.RayTaskError as error:
            self._failed(worker, error)
        except ray.exceptions.RayError:
            self._lost(worker, "crashed")
        else:
            del self._lives[life]
            self._reasons[worker] = reason
            if reason == "finished":
                self._finished.append(worker)

    def _failed(self, worker: int, error: ray.exceptions.RayTaskError) -> None:
        cause = error.cause
        if isinstance(cause, RunError):  # it has lost the coordinator; that is no reason for the others to stop
            self._lost(worker, str(cause))
        elif isinstance(cause, DecentralError):
            raise cause from None
        else:
            raise RunError(f"worker {worker} failed: {type(cause).__name__}: {cause}") from error

    def _lost(self, worker: int, reason: str) -> None:
        """The worker is no more, or as good as dead: see to it that it is, and tell the others."""
        self._lives = {life: other for life, other in self._lives.items() if other != worker}
        ray.kill(self._workers[worker])
        _answer(self._coordinator.remove.remote(worker), ANSWER_S, "the coordinator is lost")
        self._reasons[worker] = reason
        if any(isinstance(record, Left) and record.worker == worker for record in self.records):
            return  # it died after it had left
        self._take_records([_last_words(self.records, worker, reason, time.monotonic() - self._clock_s)])

    def _starting_failed(self, life: Any) -> None:
        worker = self._lives[life]
        try:
            ray.get(life)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DecentralError):
                raise error.cause from None
            self._failed(worker, error)
        except ray.exceptions.RayError as error:
            raise RunError(f"worker {worker} died while it started: {_first_line(error)}") from None

    # -- records -----------------------------------------------------------------------------------------------------

    def _poll(self) -> Poll:
        self._heed()
        poll: Poll = _answer(self._coordinator.poll.remote(), ANSWER_S, "the coordinator is lost")
        self._take(poll)
        return poll

    def _take(self, poll: Poll) -> None:
        self._take_records([record_from(fields) for fields in poll["records"]])

    def _take_records(self, records: list[Record]) -> None:
        now = time.monotonic()
        self._clock_s = min([self._clock_s, *[now - record.time_s for record in records]])
        self.records += records
        self._unseen += records
        while self._unseen:  # what an interrupt leaves here is seen when the run is ended
            record = self._unseen.popleft()
            if self._on_record is not None:
                self._on_record(record)

    # -- words -------------------------------------------------------------------------------------------------------

    def _actor(self, cls: type[Any], name: str, *, cpus: float, gpus: float) -> Any:
        return ray.remote(cls).options(
            name=f"{self._name}-{name}",
            namespace=NAMESPACE,
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
        )

    def _too_few(self, joined: int) -> str:
        size, threads, has = self._run.fleet.size, self._run.real.threads, _resources()
        return (
            f"{joined} of {size} workers joined within real.start_timeout_s = {self._run.real.start_timeout_s:g} s; "
            f"together they need {size * threads} CPUs and {size * self._gpus:g} GPUs, the cluster has "
            f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, other jobs' included"
        )


def _answer(ref: Any, timeout_s: float, trouble: str) -> Any:
    """Return an actor's answer; raises `RunError` when there is none, and our own errors as they are."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DecentralError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise RunError(f"{trouble}: {_first_line(error)}") from None


def _last_words(records: list[Record], worker: int, reason: str, now_s: float) -> Left:
    """Return the last record of a worker that cannot write it: the accounts are what its other records tell."""
    mine = [record for record in records if record.worker == worker]
    trained = [record for record in mine if isinstance(record, Trained)]
    return Left(
        time_s=now_s,
        worker=worker,
        reason=reason,
        step=max((record.step for record in trained), default=0),
        seconds={"compute": sum(record.seconds for record in trained), "talk": 0.0, "wait": 0.0, "evaluate": 0.0},
        sent_bytes=max((record.sent_bytes for record in mine if isinstance(record, Synced)), default=0),
        received_bytes=0,
        messages_sent=0,
    )


def _seconds(records: list[Record]) -> float:
    began = min(record.time_s for record in records if isinstance(record, Joined))
    return max(record.time_s for record in records if isinstance(record, Left)) - began


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _heeding_interrupts() -> Iterator[Callable[[], None]]:
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


# -- the cluster -------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(run: Run, address: str | None) -> Iterator[None]:
    """Have Ray initialised: as it is, at an address, or started here and shut down at the end."""
    if address is None:
        if ray.is_initialized():
            yield
            return
        with local_ray(run.fleet.size * run.real.threads):
            yield
        return
    _connect(address)
    with _until_shutdown():
        yield


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray of this process alone, with so many logical CPUs, quiet, and closed to others by a token of its own."""
    with _own_token():
        try:
            _init(num_cpus=cpus, include_dashboard=False)
        except Exception as error:
            ray.shutdown()
            raise RunError(
                f"Ray could not be started on this machine: {_first_line(error)} "
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
        host, _, port = address.rpartition(":")
        if not (host and port.isdigit()) or "//" in host:
            raise RunError(
                f"'{address}' is no address of a Ray head node; write host:port, such as 10.0.0.1:6379, or auto"
            )
        trouble = _knock(host, int(port))
        if trouble:
            raise RunError(f"no Ray cluster at {address}: {trouble}; {advice}")
    if ray.is_initialized():
        raise RunError(f"Ray is initialised in this process already: call train without the address {address}")
    try:
        _init(address=address)
    except (Exception, SystemExit) as error:
        ray.shutdown()
        raise RunError(f"no Ray cluster at {address}: {_first_line(error)}; {advice}") from None


def _knock(host: str, port: int) -> str:
    """Return what speaks against a Ray head node at the address; nothing if it answers like one."""
    try:
        socket.create_connection((host.strip("[]"), port), REACH_S / 2).close()
    except OSError as error:
        return f"a TCP connection failed ({error.strerror or error})"
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


def _secret() -> str:
    """Return the user's own secret for the run, or a random one; raises `ConfigError`, which does not quote it."""
    secret = os.environ.get(SECRET_VARIABLE)
    if secret is None:
        return secrets.token_hex(32)
    if len(secret) < SECRET_LENGTH or not all("!" <= letter <= "~" for letter in secret):
        raise ConfigError(
            f"{SECRET_VARIABLE}: the run's secret must be at least {SECRET_LENGTH} printable ASCII characters without "
            "spaces, such as `openssl rand -hex 32` makes; unset the variable to have a random one"
        )
    return secret


def _gpus_each(run: Run) -> float:
    if run.real.gpus is not None:
        return run.real.gpus
    return 1.0 if _resources().get("GPU", 0) >= run.fleet.size else 0.0


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources
