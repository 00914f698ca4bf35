"""The run file's section on pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from decentral.errors import ConfigError
from decentral.grid import Grid
from decentral.part import Section
from decentral.pipeline.cut import META, Cut, Fits, cut_of
from decentral.pipeline.paths import Paths, Permuted, Straight, Swapped
from decentral.pipeline.recovery import CheckFree, Recovery
from decentral.pipeline.skipping import Skipping
from decentral.protocols.codecs import Codec, Float32
from decentral.replica import buffers_of, initial_model
from decentral.state import Layout, layout_of
from decentral.task import Task

Paths.built_in.update({kind.name: kind for kind in (Straight, Swapped, Permuted, Skipping)})
PATHS = Paths.built_in
"""The ways through the stages by the name that run files use."""


class Pipeline(Section):
    """How a model that is too large for one worker is cut into stages, each with a worker of its own."""

    stages: int = Field(default=1, ge=1)
    """Workers of a replica, through which its batches go one after the other; 1: each worker has the whole model."""
    least: int | None = Field(default=None, ge=1)
    """Fewest stages with which the run goes on by itself from its newest checkpoint when there are places for fewer
    workers; unset: `stages`, so that it waits for workers instead."""
    microbatches: int = Field(default=1, ge=1)
    """Equal parts of a batch that follow one another through the stages."""
    order: Literal["1f1b", "gpipe"] = "1f1b"
    """Whether a stage goes back through a microbatch as soon as it can, so that it remembers no more than there are
    stages, or goes forward through all of them first. The same bits either way."""
    codec: Codec = Float32()
    """How activations travel to the next stage, and their gradients back."""
    recovery: Recovery = CheckFree()
    """How a stage is rebuilt whose worker was lost when nobody else holds it."""
    paths: Paths | None = None
    """Which way microbatches go; unset: one stage after the other, or as `recovery` needs it."""
    cuts: tuple[int, ...] | None = None
    """The first block of each stage but the first, counted from 0; unset: where the slowest stage is the fastest, or so
    that all have as many of the blocks that are alike if `paths` need that."""
    head: Literal["last", "first"] = "last"
    """Which stage has the blocks behind those that are alike. The first has the embedding too, whose weights may then
    be tied to those of the head."""

    @property
    def grid(self) -> Grid:
        return Grid(self.stages)

    def with_stages(self, stages: int) -> Pipeline:
        """Return the same with another number of stages, cut where the slowest is the fastest.

        A model that is whole takes its batches whole, over no paths.
        """
        if stages == self.stages:
            return self
        update: dict[str, Any] = {"stages": stages, "cuts": None}
        if stages == 1:
            update |= {"microbatches": 1, "paths": None, "recovery": CheckFree()}
        return self.model_copy(update=update)

    @property
    def ways(self) -> Paths:
        """The paths that are taken."""
        return self.paths or (Swapped() if self.recovery.mirrors else Straight())

    def cut(
        self,
        task: Task,
        seed: int,
        batch_size: int,
        seconds: Sequence[float] | None = None,
        fits: Fits | None = None,
    ) -> Cut:
        """Return where the task's model is cut, by the `seconds` of its blocks if these are known, where it `fits`.

        Raises as `cut_of`, and `ConfigError` if `paths` cannot lead there.
        """
        cut = cut_of(
            task,
            seed,
            batch_size // self.microbatches,
            self.stages,
            self.cuts,
            head=self.head,
            alike=self.ways.mirrors,
            seconds=seconds,
            fits=fits,
        )
        if self.stages > 1:
            self.ways.check_cut(cut)
        return cut

    def layouts(self, task: Task, seed: int, batch_size: int) -> tuple[Layout, ...]:
        """Return how the parameters of each stage lie in its flat vector; raises as `cut_of`."""
        if self.stages > 1:
            return self.cut(task, seed, batch_size).layouts
        with META:
            return (layout_of(initial_model(task, seed)),)

    def buffers(self, task: Task, seed: int, batch_size: int) -> tuple[set[str], ...]:
        """Return the names of what each stage keeps beside its parameters; raises as `cut_of`."""
        with META:
            model = initial_model(task, seed)
        stages = [model]
        if self.stages > 1:
            cut = self.cut(task, seed, batch_size)
            stages = [cut.part(task, model, cut.of(stage)) for stage in range(self.stages)]
        return tuple(set(buffers_of(stage)) for stage in stages)

    def assemble(self, task: Task, seed: int, batch_size: int) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return what makes the whole model's parameters `[P]` of every stage's; raises as `cut_of`."""
        return self.cut(task, seed, batch_size).assemble if self.stages > 1 else itemgetter(0)

    def check(self, workers: int, batch_size: int) -> None:
        """Raise `ConfigError` if so many workers cannot make whole replicas, or a batch no equal microbatches."""
        if workers % self.stages:
            raise ConfigError(
                f"pipeline.stages: {self.stages} workers make a replica, and the fleet has {workers}; take a multiple "
                f"of {self.stages}"
            )
        if batch_size % self.microbatches:
            raise ConfigError(
                f"pipeline.microbatches: {self.microbatches} do not divide a batch of {batch_size} samples equally"
            )
        if self.least is not None and self.least > self.stages:
            raise ConfigError(
                f"pipeline.least: {self.least}, but pipeline.stages is {self.stages}; take fewer, or none"
            )
        if self.stages == 1 and self.microbatches > 1:
            raise ConfigError("pipeline.microbatches: a pipeline of one stage takes its batches whole; set stages")
        if self.codec.shaped or not self.codec.grain or self.codec.loss not in ("none", "rounding"):
            raise ConfigError(
                f"pipeline.codec: '{self.codec.spelling()}' leaves elements out or looks at whole matrices; "
                "activations need each of theirs: take 'float32', 'bf16', 'float16', 'int8' or 'int4'"
            )
        if self.stages > 1:
            self.ways.check(self.stages, self.microbatches, self.head)
        if self.recovery.mirrors and not self.ways.mirrors:
            raise ConfigError(
                f"pipeline.recovery: '{self.recovery.spelling()}' needs stages that have learned each other's work; "
                "take paths = 'swapped', or leave paths out"
            )
        if self.cuts is not None and (
            len(self.cuts) != self.stages - 1 or list(self.cuts) != sorted({0, *self.cuts} - {0})
        ):
            raise ConfigError(
                f"pipeline.cuts: {list(self.cuts)}; {self.stages} stages need {self.stages - 1} ascending numbers of "
                "blocks, all above 0"
            )
