"""One run's supervisor: it places workers with Ray, replaces those that are gone, and passes their records on.

A worker is a number; an actor is one *life* of it. Ray never restarts an actor of ours: when a life is over the
supervisor asks for another one, which waits in Ray's queue until there is a machine for it, so that a cluster which
grows by demand grows. What Ray says of deaths is handed to the coordinator, which may have known before. A coordinator
whose process dies is started again where it was, from its ledger.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import ray
import ray.exceptions
import safetensors.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from decentral.config import Run
from decentral.errors import DecentralError, RunError
from decentral.journal import Record, record_from
from decentral.workers.actor import SLOT, Worker
from decentral.workers.cluster import first_line, resources
from decentral.workers.coordinator import Poll
from decentral.workers.coordinator_actor import CoordinatorActor
from decentral.workers.crew import Crew, Parted
from decentral.workers.ledger import Ledger, ledger_of
from decentral.workers.places import Shortage, Spare, Spares, done_of
from decentral.workers.resume import Resumption, cut_anew

NAMESPACE = "decentral"
"""Ray namespace of the actors; a run's are called `decentral-<run>-coordinator` and `decentral-<run>-worker-<id>`."""

POLL_S = 0.5
ANSWER_S = 30.0
"""Seconds one of our actors has to answer a question."""
RESULT_S = 600.0
"""Seconds a worker has to hand over its parameters."""
FAREWELL_S = 2.0
"""Seconds the coordinator has for the last records when a run is broken off, and killed actors have to be gone."""
STARTS = 3
"""A worker that has died, or was refused, so many times in a row before it joined is not started again."""

log = logging.getLogger(__name__)


class FleetLost(RunError):
    """Every worker has died or left before one had finished, or the run had better go on with so many `stages`.

    Then the `crew`, if there is one, has left with all that is needed for that.
    """

    def __init__(self, message: str, stages: int | None = None, crew: Crew | None = None) -> None:
        super().__init__(message)
        self.stages, self.crew = stages, crew


@dataclass(eq=False)
class Life:
    """An actor that is worker `worker` for the `number`-th time.

    `placed` is done when Ray has found a place for it, `end` when its life is over.
    """

    worker: int
    number: int
    actor: Any
    placed: Any
    end: Any


@dataclass(eq=False)
class Parting:
    """Workers have been asked to leave at one point, to go on as so many `stages`, and will `answer` if they do.

    If so, they have `parted`, and those who have left are waited for until `until_s`. `lives` are theirs, by worker.
    """

    stages: int
    why: str
    answer: Any
    parted: Parted | None = None
    until_s: float = math.inf
    lives: dict[int, Life] = field(default_factory=dict)


class Job:
    """One run's actors; `on_record` is handed every record as it comes, and the job keeps none.

    A run that has fewer stages than it was meant to have looks out for places for `stages` of them. The `crew` of a run
    whose model has been cut anew goes on in this one.
    """

    def __init__(
        self,
        run: Run,
        secret: str,
        on_record: Callable[[Record], None] | None,
        heed: Callable[[], None],
        resumed: Resumption | None = None,
        stages: int | None = None,
        crew: Crew | None = None,
    ) -> None:
        self._heed, self._crew = heed, crew
        self._handed_over: dict[int, Any] = {}
        self.params: dict[int, Tensor] = {}
        self.slots: dict[int, dict[str, Tensor]] = {}
        self._run, self._on_record = run, on_record
        self._resumed = resumed and resumed._replace(records=())  # of which no actor needs any
        self._owner = secrets.token_hex(4)
        self._name = f"decentral-{self._owner}"
        self._secret = secret
        self._gpus = _gpus_each(run)
        self._ledger = ledger_of(self._owner)
        self._coordinator: Any = None
        self._coordinators = 0
        self._address = ""
        self._node = ""
        self._lives: dict[int, Life] = {}
        self._dying: list[Life] = []  # taken out of the run; Ray has not said yet that they are dead
        self._lived: Counter[int] = Counter()
        self._bad_starts: Counter[int] = Counter()
        self._joined: set[tuple[int, int]] = set()
        self._finished: dict[int, Life] = {}
        self._reasons: dict[int, str] = {}
        self._taken = 0
        self._unseen: deque[Record] = deque()
        self._has_begun = False
        self._stand_ins: set[Life] = set()
        self._fewer: int | None = None  # stages for which there were places when last there were too few
        self._parting: Parting | None = None
        self._stages = stages or run.pipeline.stages
        self._shortage = Shortage(run)
        self._spares = Spares(
            lambda name: self._worker_like(Spare, name).remote(), run.replicas * self._stages - run.fleet.size
        )

    # -- the phases of a run -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Place all actors and wait until the run begins.

        Raises `RunError` if workers die or time runs out, and `FleetLost` if it can go on from a checkpoint then.
        """
        run, began = self._run, time.monotonic()
        self._start_coordinator()
        if self._crew is not None:
            try:
                self._handed_over = self._crew.hand_over(run, self._newcomer)
            except RunError as error:
                raise FleetLost(str(error)) from None
        for worker in range(run.fleet.size):
            self._place(worker)
        wait_s = 0.0
        while not (poll := self._poll())["begun"]:
            now = time.monotonic()
            if poll["joined"] < self._least:
                if now - began > run.real.start_timeout_s:
                    stages = self._shortage.stages(self._placed) if self._resumed else None
                    few = self._too_few(poll["joined"])
                    raise RunError(few) if stages is None else FleetLost(few, stages)
            elif not wait_s:
                wait_s = now - began  # so long it took them: the others have as long again
            elif now - began > 2 * wait_s:
                self._ask("begin")
            self._attend()

    def supervise(self) -> None:
        """Pass records on and fill gaps until every member has finished, left or died.

        Raises what a task raised, and `FleetLost` if nobody has finished or stages are to be cut anew.
        """
        short_since: float | None = None
        while (members := self._poll()["members"]) or any(self._has_joined(life) for life in self._lives.values()):
            short = len(members) < (self._run.real.min_workers or 1) and not self._finished
            short_since = (short_since or time.monotonic()) if short else None
            if short_since and time.monotonic() - short_since > self._run.real.start_timeout_s:
                raise RunError(too_few_left(self._run, len(members)))
            self._attend()
        self._heed()  # an interrupt that somebody has swallowed while the last records came
        if self._parting is not None and self._have_parted(self._parting):
            raise self._gone_with_states(self._parting)
        if not self._finished:
            reasons = "; ".join(f"worker {worker}: {reason}" for worker, reason in sorted(self._reasons.items()))
            raise FleetLost(f"no worker is left; {reasons}", self._fewer)

    def collect(self) -> None:
        """Fetch parameters and slots of the workers that finished."""
        for worker, life in self._finished.items():
            try:
                data = ray.get(life.actor.result.remote(), timeout=RESULT_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                continue  # it died after it had finished; the others have theirs
            tensors = safetensors.torch.load(data)
            self.params[worker] = tensors.pop("params")
            self.slots[worker] = {name.removeprefix(SLOT): tensor for name, tensor in tensors.items()}
        if self._run.pipeline.grid.missing(self.params):
            raise RunError("workers died after they had finished; there are not all parameters left to return")

    def end(self) -> None:
        """Kill every actor of the run; pass on what records there are, waiting a bounded time."""
        lives = [*self._lives.values(), *self._dying]
        lives += [] if self._parting is None else self._parting.lives.values()
        try:
            self._spares.forget()
            if self._crew is not None:
                self._crew.release()
            for actor in self._handed_over.values():
                ray.kill(actor)
            for life in [*lives, *self._finished.values()]:
                ray.kill(life.actor)
            if self._coordinator is not None:
                self._bid_farewell()
        finally:
            if self._coordinator is not None:
                ray.kill(self._coordinator)
            Ledger(self._ledger).remove()  # if it had no farewell, and was on this machine
            if lives:
                ray.wait([life.end for life in lives], num_returns=len(lives), timeout=FAREWELL_S)

    # -- workers -----------------------------------------------------------------------------------------------------

    @property
    def _least(self) -> int:
        if self._crew is not None:
            return self._run.fleet.size  # each of them has a part of the state
        return self._run.real.min_workers or self._run.fleet.size

    @property
    def _placed(self) -> set[int]:
        """The workers for whom Ray has found a place of their own."""
        done = done_of([life.placed for life in self._lives.values()])
        return {worker for worker, life in self._lives.items() if life.placed in done and life not in self._stand_ins}

    @property
    def _replaces(self) -> bool:
        """Whether a worker that is gone gets another life: not when the run is about to end."""
        return self._run.takes_newcomers and not self._finished and self._parting is None

    def _place(self, worker: int, beside: str | None = None) -> Life:
        """Have the worker begin another life: where Ray finds a place, or `beside` others on that node."""
        actor = self._handed_over.pop(worker, None) or self._newcomer(worker, beside)
        number = self._lived[worker]
        self._lived[worker] += 1
        placed = actor.placed.remote()  # before it runs, which it does until it ends
        life = self._lives[worker] = Life(worker, number, actor, placed, actor.run.remote(self._address))
        return life

    def _newcomer(self, worker: int, beside: str | None = None) -> Any:
        number = self._lived[worker]
        name = f"worker-{worker}" + (f"-life-{number}" if number else "")
        made = self._worker_like(Worker, name, beside)
        resumed = "" if self._resumed is None else self._resumed.folder
        return made.remote(self._run.to_table(), worker, number, self._secret, resumed)

    def _worker_like(self, cls: type[Any], name: str, beside: str | None = None) -> Any:
        if beside is not None:
            where = NodeAffinitySchedulingStrategy(beside, soft=True)
            return self._actor(cls, name, num_cpus=0, num_gpus=0, scheduling_strategy=where)
        return self._actor(
            cls, name, num_cpus=self._run.real.threads, num_gpus=self._gpus, scheduling_strategy="SPREAD"
        )

    def _attend(self) -> None:
        """Wait a moment for a life to end; settle what has ended, and give another life to who is missing."""
        ends = {life.end: life for life in (*self._lives.values(), *self._dying)}
        over = ray.wait(list(ends), num_returns=1, timeout=POLL_S)[0] if ends else []
        for end in over:
            self._settle(ends[end])
        if not ends:
            time.sleep(POLL_S)
        if self._replaces:
            for worker in range(self._run.fleet.size):
                if worker not in self._lives and self._bad_starts[worker] < STARTS:
                    self._place(worker)
        if self._parting is not None:
            self._see_off(self._parting)
        elif self._run.pipeline.least is not None and self._has_begun and not self._finished:
            self._look_at_places()

    def _look_at_places(self) -> None:
        """Have the model cut anew if for long there have been places for fewer stages alone, or there are for more.

        In the former case those who have no place live beside others meanwhile, so that every row is whole and none of
        the state is lost. Raises `FleetLost` when that does not go well.
        """
        placed, size = self._placed, self._run.fleet.size
        stages = self._shortage.lasting(placed, time.monotonic())
        if stages is not None:
            self._fewer = stages
            why = f"there have been places for {len(placed)} of {size} workers alone"
            self._stand_in(placed)
            if len(self._lives) < size:  # who has died again and again as it began
                raise FleetLost(why, stages)
            self._part(stages, why)
            return
        if len(placed) < size:
            self._spares.forget()  # they would take the places of workers
            return
        self._fewer = None
        self._spares.want()
        if self._spares.are_there():
            self._part(self._stages, f"there are places for {self._stages} stages again")

    def _stand_in(self, placed: Collection[int]) -> None:
        """Have those who wait for a place begin beside those who have one, on one node after the other."""
        hosts = set[str]()
        for worker in placed:
            with suppress(ray.exceptions.RayError):  # it has died, as we shall hear
                hosts.add(ray.get(self._lives[worker].placed))
        nodes = cycle(sorted(hosts))
        for worker, life in list(self._lives.items()):
            if hosts and worker not in placed and life not in self._stand_ins:
                ray.kill(life.actor)
                self._stand_ins.add(self._place(worker, beside=next(nodes)))

    def _part(self, stages: int, why: str) -> None:
        """Ask all to leave at one point."""
        reason = cut_anew(self._run.pipeline.stages, stages)
        answer = self._coordinator.part.remote(reason, self._run.checkpoint.writing_s)
        self._parting = Parting(stages, why, answer)

    def _see_off(self, parting: Parting) -> None:
        """Raise `FleetLost` when those who had to leave have done so, or should have."""
        if parting.parted is None and parting.answer in done_of([parting.answer]) and not self._have_parted(parting):
            for life in parting.lives.values():  # somebody has left for another reason
                ray.kill(life.actor)
            self._parting = None
        elif time.monotonic() > parting.until_s:
            raise self._gone_with_states(parting)

    def _have_parted(self, parting: Parting) -> bool:
        """Return whether all could be asked to leave; wait for the answer."""
        if parting.parted is None:
            try:
                parting.parted = ray.get(parting.answer, timeout=ANSWER_S)
            except ray.exceptions.RayError:  # the coordinator is gone, and the question with it
                return False
            parting.until_s = time.monotonic() + ANSWER_S
        return parting.parted is not None

    def _gone_with_states(self, parting: Parting) -> FleetLost:
        """Return what ends this job; those who have left are the next one's."""
        assert parting.parted is not None
        actors = {worker: life.actor for worker, life in parting.lives.items()}
        staying = [worker for worker, life in parting.lives.items() if life not in self._stand_ins]
        parting.lives = {}
        return FleetLost(parting.why, parting.stages, Crew(self._run, parting.parted, actors, staying))

    def _settle(self, life: Life) -> None:
        """A life has ended one way or another."""
        if life in self._dying:  # as it had to: now it is certain
            self._dying.remove(life)
            self._ask("remove", life.worker, life.number, self._reasons[life.worker])
            return
        try:
            reason = ray.get(life.end)
        except ray.exceptions.RayTaskError as error:
            self._failed(life, error)
        except ray.exceptions.RayError as error:
            self._died(life, error)
        else:
            del self._lives[life.worker]
            self._reasons[life.worker] = reason
            if reason == "finished":
                self._finished[life.worker] = life
            elif self._parting is not None:
                self._parting.lives[life.worker] = life
            else:
                ray.kill(life.actor)

    def _failed(self, life: Life, error: ray.exceptions.RayTaskError) -> None:
        cause = error.cause
        if isinstance(cause, RunError) and self._has_begun:
            self._lost(life, str(cause))  # it was refused, or has lost the coordinator: the others go on
        elif isinstance(cause, DecentralError):
            raise cause from None
        else:
            raise RunError(f"worker {life.worker} failed: {type(cause).__name__}: {cause}") from error

    def _died(self, life: Life, error: ray.exceptions.RayError) -> None:
        self._poll()  # it may have joined, and the run begun, since we asked last
        if life.worker not in self._lives:
            return
        bad_starts = self._bad_starts[life.worker] + (not self._has_joined(life))
        if not self._has_begun and not (self._run.real.min_workers and bad_starts < STARTS and self._crew is None):
            died = f"worker {life.worker} died while it started: {first_line(error)}"
            raise (RunError if self._crew is None else FleetLost)(died) from None  # its state is in checkpoints alone
        self._lost(life, "crashed")

    def _lost(self, life: Life, reason: str) -> None:
        """The life is over: tell the others."""
        if not self._has_joined(life):
            self._bad_starts[life.worker] += 1
            if self._bad_starts[life.worker] == STARTS:
                log.warning(
                    "worker %d has died %d times before it joined: it is not started again", life.worker, STARTS
                )
        del self._lives[life.worker]
        ray.kill(life.actor)
        self._ask("remove", life.worker, life.number, reason)
        self._reasons[life.worker] = reason

    def _taken_out(self, worker: int, number: int, reason: str) -> None:
        """The coordinator has found out that a worker is gone; see to it that it is."""
        self._reasons[worker] = reason
        life = self._lives.get(worker)
        if life is not None and life.number == number:
            del self._lives[worker]
            self._dying.append(life)
            ray.kill(life.actor)

    def _has_joined(self, life: Life) -> bool:
        return (life.worker, life.number) in self._joined

    # -- the coordinator ---------------------------------------------------------------------------------------------

    def _start_coordinator(self) -> None:
        """Start it on the driver's node, where its ledger is, or will be. Raises `RunError`."""
        node = self._node or ray.get_runtime_context().get_node_id()
        port = int(self._address.rpartition(":")[2]) if self._address else self._run.real.port
        until = time.monotonic() + ANSWER_S
        while True:
            number = self._coordinators
            self._coordinators += 1
            self._coordinator = self._actor(
                CoordinatorActor,
                "coordinator" + (f"-life-{number}" if number else ""),
                num_cpus=0,
                num_gpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(self._run.to_table(), self._secret, self._owner, self._ledger, self._resumed)
            started = self._coordinator.start.remote(port)
            wait_s = self._run.real.start_timeout_s  # a task may take long to make, and a long ledger to replay
            if not _is_unschedulable(started) or time.monotonic() > until:
                self._address, self._node = _answer(started, wait_s, "the coordinator could not be started")
                return
            time.sleep(POLL_S)  # Ray asks any node where actors may go, and one that has just come knows few others

    def _ask(self, method: str, *values: Any) -> Any:
        """Return the coordinator's answer; one that has died is started again, for `real.start_timeout_s` at most."""
        until = math.inf
        while True:
            try:
                return _answer_or_death(getattr(self._coordinator, method).remote(*values), ANSWER_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                until = min(until, time.monotonic() + self._run.real.start_timeout_s)
                if time.monotonic() > until:
                    raise RunError(f"the coordinator is lost: {first_line(error)}") from None
                self._start_coordinator_again(until)

    def _start_coordinator_again(self, until: float) -> None:
        """Its port may still be taken, and Ray may have lost sight of its node: try until that time."""
        while True:
            ray.kill(self._coordinator)
            try:
                self._start_coordinator()
                return
            except RunError:
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)

    def _poll(self) -> Poll:
        self._heed()
        poll = self._poll_once()
        self._take(poll)
        return poll

    def _poll_once(self) -> Poll:
        poll: Poll = self._ask("poll", self._taken)
        return poll

    def _take(self, poll: Poll) -> None:
        self._has_begun = poll["begun"]
        joined = {(worker, life) for worker, life in poll["lives"]} - self._joined
        self._joined |= joined
        for worker, _ in joined:
            self._bad_starts[worker] = 0
        self._taken += len(poll["records"])
        self._take_records([record_from(fields) for fields in poll["records"]])
        for gone in poll["gone"]:
            self._taken_out(*gone)
        for news in poll["news"]:
            log.info(news)

    def _bid_farewell(self) -> None:
        try:
            self._take(ray.get(self._coordinator.close.remote(self._taken), timeout=FAREWELL_S))
        except (ray.exceptions.RayError, DecentralError):
            return

    # -- records -----------------------------------------------------------------------------------------------------

    def _take_records(self, records: list[Record]) -> None:
        self._unseen += records
        while self._unseen:  # what an interrupt leaves here is seen when the run is ended
            record = self._unseen.popleft()
            if self._on_record is not None:
                self._on_record(record)

    # -- words -------------------------------------------------------------------------------------------------------

    def _actor(self, cls: type[Any], name: str, **options: Any) -> Any:
        return ray.remote(cls).options(
            name=f"{self._name}-{name}", namespace=NAMESPACE, max_restarts=0, max_task_retries=0, **options
        )

    def _too_few(self, joined: int) -> str:
        size, threads, has = self._run.fleet.size, self._run.real.threads, resources()
        return (
            f"{joined} of {size} workers joined within real.start_timeout_s = {self._run.real.start_timeout_s:g} s; "
            f"together they need {size * threads} CPUs and {size * self._gpus:g} GPUs, the cluster has "
            f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, other jobs' included"
        )


def too_few_left(run: Run, members: int) -> str:
    """Say that the run ends because it has had too few `members` for too long."""
    least = run.real.min_workers
    left = f"{members} workers are left, fewer than real.min_workers = {least}" if least else "no worker is left"
    return f"{left}, and for real.start_timeout_s = {run.real.start_timeout_s:g} s no other has come"


def _is_unschedulable(ref: Any) -> bool:
    """Return whether Ray finds no place for the actor that is to answer; wait until it has answered, or cannot."""
    try:
        ray.get(ref, timeout=ANSWER_S)
    except ray.exceptions.ActorUnschedulableError:
        return True
    except Exception:  # whoever asks for the answer meets it
        return False
    return False


def _answer_or_death(ref: Any, timeout_s: float) -> Any:
    """Return an actor's answer; raises our own errors as they are, and Ray's when the actor gives none."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DecentralError):
            raise error.cause from None
        raise


def _answer(ref: Any, timeout_s: float, trouble: str) -> Any:
    """Return an actor's answer; raises `RunError` when there is none, and our own errors as they are."""
    try:
        return _answer_or_death(ref, timeout_s)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise RunError(f"{trouble}: {first_line(error)}") from None


def _gpus_each(run: Run) -> float:
    if run.real.gpus is not None:
        return run.real.gpus
    return 1.0 if resources().get("GPU", 0) >= run.fleet.size else 0.0
