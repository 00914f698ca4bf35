"""Run files: TOML in, validated models out. A message names the file, the field, the value and what is allowed."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from pydantic import Field, ValidationError

from decentral.checkpoint.settings import Checkpoints
from decentral.errors import ConfigError
from decentral.fleet import Fleet, StageLosses
from decentral.inner import AdamW, Inner
from decentral.naming import class_named
from decentral.part import Section
from decentral.pipeline import Cut, Pipeline, TorchStage
from decentral.protocols import RULES, DiLoCo, Int8, Nesterov, SyncRule
from decentral.protocols.protection import ParityGroups
from decentral.protocols.rounds import AllReduceRule
from decentral.protocols.schedule import Every
from decentral.task import Task
from decentral.tasks import load_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


NoticeName = Literal["sigterm", "ray", "aws", "aws-rebalance", "gcp", "azure"]


class Real(Section):
    """How a run is placed on real machines."""

    threads: int = Field(default=1, ge=1)
    """CPU threads of a worker. More workers x threads than cores makes all of them many times slower."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of a worker (a fraction shares one); unset: one each if the cluster has enough, otherwise none."""
    offload: bool = False
    """Keep anchors, outer state and messages in host memory while the model trains on a GPU."""
    port: int = Field(default=0, ge=0, le=65535)
    """TCP port of the coordinator; 0 takes a free one."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """TCP port on which the driver serves metrics for Prometheus while it trains; 0: none."""
    metrics_host: str = "127.0.0.1"
    """Interface of that port. Whoever reaches it reads the metrics, so it is this machine alone unless set."""
    certificates: Path | None = None
    """Folder of every machine with `ca.pem`, `worker.pem` and `worker.key` (see `decentral certs`); unset: no TLS."""
    min_workers: int | None = Field(default=None, ge=1)
    """Workers without whom the run neither begins nor, for longer than `start_timeout_s`, goes on; whoever comes later
    joins then. Unset: all to begin, and one to go on."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds until enough workers must have joined, or the run ends; so long the coordinator may be away, too."""
    notices: tuple[NoticeName, ...] = ("sigterm", "ray")
    """Who may tell a worker that its machine will be taken away; it then leaves the run between two rounds."""
    stream_bps: float = Field(default=200e6, ge=0, allow_inf_nan=False)
    """Bits per second that a worker sends, and that it receives, while it trains, so that streams do not slow its
    steps down; 0: as many as come. While it waits it is not held back, nor ever in what a newcomer needs."""
    shape_links: bool = False
    """Emulate the fleet's links: bytes really travel at `up_bps`, `down_bps` and `latency_s`, as they do simulated; the
    coordinator is `latency_s` away, too."""


class Sim(Section):
    """How a run is simulated. Nothing here changes a bit of what comes out, but a GPU."""

    processes: int | None = Field(default=None, ge=1)
    """Processes that compute local steps, forked from this one; unset: one for each core if the run is long enough for
    that to pay, otherwise none but this one (as with 1). A comparison carries out so many runs at a time instead."""
    device: str = "cpu"
    """Where local steps are computed: "cpu", or a GPU ("cuda", "cuda:1"), one replica's after the other's. What is sent
    and merged stays in host memory."""


WARMUP_STEPS = 20
"""Of the inner optimiser that a run has by default, if it has so many steps."""


def _usual_inner(run: Mapping[str, Any]) -> Inner:
    """Return the inner optimiser of a run that names none, by the valid ones of the fields before it."""
    warmup_steps = min(WARMUP_STEPS, run.get("steps", WARMUP_STEPS))
    return AdamW(lr=3e-3, warmup_steps=warmup_steps, schedule="cosine", clip_norm=1.0)


class Run(Section):
    """Everything that defines a run; the same file trains, simulates and compares."""

    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, of what local steps draw (dropout) and of every random choice of rule and fleet.

    Training samples are the task's: those that come with decentral choose them by `task.sample_seed`.
    """
    steps: int = Field(default=300, ge=1)
    """Local steps of every worker."""
    batch_size: int = Field(default=8, ge=1)
    """Samples in a local step."""
    evaluate_every: int = Field(default=50, ge=0)
    """Local steps between evaluations of the first worker, at the next round's end; 0: before and after only."""
    leases: bool = False
    """All workers share one stream of samples, leased to them in ranges, so that each is accounted for; otherwise each
    worker has a stream of its own."""
    epochs: int | None = Field(default=None, ge=1)
    """With leases: the run ends for everybody when so many epochs of the task are used up, if not with `steps`."""
    patience_s: float = Field(default=60.0, gt=0)
    """Seconds a worker waits for another one's packet before it goes on without. In the all-reduces "butterfly" and
    "gather" it waits up to ten times as long for a worker that is known to come, but late."""
    norm_limit: float = Field(default=100.0, ge=0)
    """A contribution whose norm is more than so many times the running median is refused for the round; 0: none is."""
    task: dict[str, Any] = Field(default_factory=lambda: {"name": "byte_gpt"})
    """What is trained: `name` (built in, or module:function) and the task's own fields."""
    rule: SyncRule = DiLoCo(period=Every(period=20), outer=Nesterov(lr=1.0, momentum=0.5), codec=Int8())
    """The sync rule: `name` (built in, or module:Class) and its hyper-parameters.

    The default run is short: with the paper's outer momentum of 0.9 its fifteen rounds would be all overshoot.
    """
    inner: Inner = Field(default_factory=_usual_inner)
    """The inner optimiser: `name` and its hyper-parameters. The default's warm-up is as long as the run if that is
    shorter than 20 steps."""
    fleet: Fleet = Fleet()
    """The machines."""
    real: Real = Real()
    """How real machines are used."""
    checkpoint: Checkpoints = Checkpoints()
    """Where a real run keeps its state, to go on from there when everything is lost."""
    parity: ParityGroups = ParityGroups()
    """Who keeps in memory what is a worker's own, to give it back to whoever is lost and comes again."""
    pipeline: Pipeline = Pipeline()
    """How a replica is cut into stages, if it is."""
    sim: Sim = Sim()
    """How simulations are computed."""
    compare: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """For `decentral compare`: a table of fields for each rule that needs its own. With `rule` among them the table's
    name is another name for that rule, so that one rule may be compared under several settings."""

    @property
    def replicas(self) -> int:
        """How many models are trained: a worker each, or a row of workers each, if models are cut into stages."""
        return self.fleet.size // self.pipeline.stages

    @property
    def takes_newcomers(self) -> bool:
        """Whether a worker may come into the run when it has begun."""
        return self.rule.takes_newcomers

    @property
    def cuts_phases(self) -> bool:
        """Whether a local phase may end early: not where workers, or the stages of a replica, count steps together."""
        return self.rule.takes_unequal_phases and self.epochs is None and self.pipeline.stages == 1

    def make_task(self) -> Task:
        """Return the task the run file describes; raises `ConfigError` or `TaskError`."""
        fields = dict(self.task)
        name = fields.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError("task.name: missing; name a built-in task, or module:function")
        try:
            return load_task(name, **fields)
        except ValidationError as error:
            raise ConfigError("\n".join(_messages(error, ("task",)))) from error

    def make_stage(self, task: Task, cut: Cut, worker: int, device: torch.device | None = None) -> TorchStage:
        """Return the stage of the task's model that the worker trains, on the CPU if no device is given."""
        return TorchStage(
            task,
            self.inner,
            cut,
            worker=worker,
            seed=self.seed,
            batch_size=self.batch_size,
            microbatches=self.pipeline.microbatches,
            total_steps=self.steps,
            device=device,
        )

    def with_stages(self, stages: int) -> Run:
        """Return this run, its replicas cut into so many stages and no more workers than these need."""
        fleet = self.fleet if stages == self.pipeline.stages else self.fleet.first(self.replicas * stages)
        least = self.real.min_workers and min(self.real.min_workers, fleet.size)
        real = self.real.model_copy(update={"min_workers": least})
        return self.model_copy(update={"pipeline": self.pipeline.with_stages(stages), "fleet": fleet, "real": real})

    def check(self) -> None:
        """Raise `ConfigError` for a combination of parts that cannot work."""
        self.fleet.check()
        self.pipeline.check(self.fleet.size, self.batch_size)
        self.rule.check(self.replicas)
        self.inner.check(self.steps)
        if self.fleet.brings_newcomers:
            self.rule.check_newcomers()
        churn = self.fleet.churn
        if isinstance(churn, StageLosses) and churn.stages != self.pipeline.stages:
            raise ConfigError(f"fleet.churn.stages: {churn.stages}, but pipeline.stages is {self.pipeline.stages}")
        if self.checkpoint.url:
            self.rule.check_checkpoints()
        if self.parity.workers is not None:
            if self.parity.workers > self.fleet.size:
                raise ConfigError(
                    f"parity.workers: groups of {self.parity.workers}, but the fleet has {self.fleet.size} workers"
                )
            self.rule.check_parity()
        if self.pipeline.stages > 1:
            self._check_stages()
        least = self.pipeline.least
        if least is not None and least < self.pipeline.stages:
            self._check_fewer_stages(least)
        if self.leases:
            self.rule.check_leases(bounded=self.epochs is not None)
        elif self.epochs is not None:
            raise ConfigError("epochs: workers count them together, which needs leases = true")

    def _check_stages(self) -> None:
        self.rule.check_stages()
        for able, field in (
            (not self.leases, "leases"),
            (self.parity.workers is None, "parity.workers"),
            (not self.real.offload, "real.offload"),
            (not self.fleet.layerwise, "fleet.layerwise"),
        ):
            if not able:
                raise ConfigError(f"{field}: not for a model that is cut into stages; leave it out, or pipeline.stages")

    def _check_fewer_stages(self, least: int) -> None:
        if not self.checkpoint.url:
            raise ConfigError(
                "pipeline.least: a model is cut anew at a checkpoint; set checkpoint.url, or leave it out"
            )
        self.rule.check_other_stages()
        for stages in range(least, self.pipeline.stages):
            fewer = self.with_stages(stages)
            try:
                fewer.model_copy(update={"pipeline": fewer.pipeline.model_copy(update={"least": None})}).check()
            except ConfigError as error:
                raise ConfigError(f"pipeline.least: with {stages} stages: {error}") from error

    def leased_samples(self, task: Task) -> int | None:
        """Return how many samples the run may lease in all; None: without end. Raises `ConfigError`.

        The last batch reaches into the next epoch if the batch size does not divide what `epochs` comes to.
        """
        if self.epochs is None:
            return None
        if task.samples_per_epoch is None:
            raise ConfigError(
                f"epochs: the task '{self.task['name']}' has an endless stream of samples; leave epochs out and give "
                "steps, or have the task say samples_per_epoch"
            )
        return -(-self.epochs * task.samples_per_epoch // self.batch_size) * self.batch_size

    def with_rule(self, name: str) -> Run:
        """Return this run under another rule, with its own fields from `compare` and else what both rules share.

        `name` is a rule's, or that of a table of `compare` which says whose settings it has (`rule`).

        Fields of the same name (period, codec, ...) are taken over from this run's rule, so that rules are compared at
        the same settings; all others keep their defaults, and so does a codec or all-reduce that belongs to the rule.
        """
        own_fields = dict(self.compare.get(name, {}))
        rule = own_fields.pop("rule", name)
        if not isinstance(rule, str):
            raise ConfigError(f"compare.{name}.rule: {rule} is not the name of a rule")
        try:
            cls = class_named(rule, RULES, SyncRule, "rule")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        fields: dict[str, Any] = {"name": rule}
        if rule == self.rule.spelling():
            fields.update(self.rule.to_table())
        else:
            shared = {"period", "codec", "all_reduce"} & set(cls.model_fields) & set(type(self.rule).model_fields)
            usual = AllReduceRule.model_fields
            own = {field for field in shared & set(usual) if cls.model_fields[field].default != usual[field].default}
            values = ((field, getattr(self.rule, field)) for field in shared - own)
            # A period may be a plain number in a rule of the user's own.
            fields.update({field: value.period if isinstance(value, Every) else value for field, value in values})
        fields.update(own_fields)
        return validated({**self.to_fields(), "rule": fields}, f"rule '{name}'")

    def changed(self, overrides: Sequence[str], where: str) -> Run:
        """Return this run with `key=value` overrides applied. Raises `ConfigError`, which begins with `where`."""
        table = self.to_table()
        for override in overrides:
            _override(table, override)
        return validated(table, where)

    def to_fields(self) -> dict[str, Any]:
        """Return the fields as objects, for making a changed copy."""
        return {field: getattr(self, field) for field in type(self).model_fields}


def read_run(path: Path | None, overrides: Sequence[str] = (), task: str | None = None) -> Run:
    """Return the run a file describes (the default run if None), with `key=value` overrides applied.

    Raises `ConfigError`: one message that names every wrong field.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the run file: {error.strerror or error}") from error
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
        if not table:
            raise ConfigError(f"{path}: the run file is empty; give at least one field, such as steps = 300")
    if task is not None:
        table["task"] = {"name": task}
    for override in overrides:
        _override(table, override)
    return validated(table, str(path) if path else "run")


def validated(table: Mapping[str, Any], where: str) -> Run:
    """Return the checked run of a table; raises `ConfigError`."""
    try:
        run = Run.model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {message}" for message in _messages(error))) from error
    try:
        run.check()
        task = run.make_task()
        run.fleet.check_work(task.tokens_per_sample)
        run.leased_samples(task)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return run


def write_run(run: Run, path: Path) -> None:
    """Write a run file that spells out every field, so that it reproduces the run; above them, with which versions."""
    wrote = {"Python": platform.python_version(), **{name: version(name) for name in ("decentral", "torch")}}
    versions = ", ".join(f"{name} {number}" for name, number in wrote.items())
    path.write_text(f"# {versions}\n{tomli_w.dumps(run.to_table())}", encoding="utf-8")


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, such as --set rule.period=100")
    *parents, leaf = key.strip().split(".")
    if parents and parents[0] not in table:  # what the file leaves to the default is what an override changes
        table.update({name: value for name, value in Run().to_table().items() if name == parents[0]})
    place: dict[str, Any] = table
    for parent in parents:
        held = place.setdefault(parent, {})
        if isinstance(held, str):  # rule = "diloco" is short for a table with that name
            held = place[parent] = {"name": held}
        if not isinstance(held, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a table")
        place = held
    value = _value(text.strip())
    if leaf == "name" and place.get("name") != value:
        place.clear()  # another part has other fields
    place[leaf] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _messages(error: ValidationError, place: tuple[str | int, ...] = ()) -> Iterator[str]:
    for found in error.errors():
        where = (*place, *found["loc"])
        cause = found.get("ctx", {}).get("error")
        if found["type"] == "default_factory_not_called":  # for what it goes by is not valid, as another message says
            continue
        if isinstance(cause, ValidationError):  # a part inside a part
            yield from _messages(cause, where)
            continue
        name = ".".join(str(step) for step in where)
        message = found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        shown = "" if cause is not None else f" (got {_short(found['input'])})"
        yield f"{name}: {message}{shown}" if name else f"{message}{shown}"


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
