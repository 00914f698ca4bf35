"""What a stage's worker keeps in memory: state, and what backward passes need of the microbatches under way."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.inner import Inner
from decentral.pipeline.cut import META, Block, Cut, Inputs
from decentral.pipeline.orders import Timetable, timetable
from decentral.pipeline.paths import Ground
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.skipping import Skipping
from decentral.replica import initial_model
from decentral.task import Task, to_device

FLOAT32_BYTES = 4
GIB = 2**30


def memory_bytes(device: torch.device) -> float:
    """Return how many bytes of memory a GPU has; of the CPU: this machine, without end if the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else math.inf


def state_bytes(inner: Inner, parameters: int) -> dict[str, int]:
    """Return the bytes of so many parameters, of their gradients and of what the inner optimiser keeps, by name."""
    nbytes = FLOAT32_BYTES * parameters
    means = len(inner.momenta) + len(inner.variances)
    return {"parameters": nbytes, "gradients": nbytes, "inner optimiser": nbytes * means}


def require_room(who: str, memory: float, parts: Mapping[str, int], advice: Callable[[], str], note: str = "") -> None:
    """Raise `ConfigError`, with the figures and `advice`, if `parts`, bytes by name, exceed so many bytes of `memory`.

    `who` has that memory; `note` says what of it is not counted.
    """
    if sum(parts.values()) > memory:
        told = ", ".join(f"{what} {nbytes / GIB:.1f}" for what, nbytes in parts.items())
        needs = f"needs {sum(parts.values()) / GIB:.1f} GiB{note}: {told}"
        raise ConfigError(f"{who} with {memory / GIB:.4g} GiB, and {needs}; take {advice()}")


def bytes_remembered(task: Task, seed: int, samples: int) -> list[int]:
    """Return the bytes that each block remembers of a microbatch of so many samples until it has gone back.

    Counted by shapes, nothing is computed. Attention counts as fused kernels have it, which remember no scores.
    Raises `TaskError` if the model is no sequence of blocks.
    """
    with META:
        model = initial_model(task, seed)
    with _Fused():
        return remembered(task.blocks(model), Inputs().of(task, to_device(task.batch(0, 0, samples), META)))


def remembered(blocks: Sequence[nn.Module], values: Tensor) -> list[int]:
    """Return the bytes that each block saves for its backward pass; what the one before has saved counts there."""
    seen = {_storage(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    found: list[int] = []

    def save(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in seen:
            seen.add(storage)
            found[-1] += tensor.untyped_storage().nbytes()
        return tensor

    for block in blocks:
        found.append(0)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            values = block(values)
    return found


def in_flight(order: Literal["1f1b", "gpipe"], microbatches: int, hops: int, place: int) -> int:
    """Return how many microbatches the worker at hop `place` of a straight way remembers at most."""
    return min(microbatches, hops - place) if order == "1f1b" else microbatches


def activation_bytes(cut: Cut, remembers: Sequence[int], times: Timetable) -> dict[int, int]:
    """Return the bytes that each worker remembers at most of microbatches under way, blocks `remembers` so many each.

    With what a hop received and what it handed over, in float32; the loss remembers as much as it is given.
    """
    most = {}
    for worker, actions in times.actions.items():
        held = peak = 0
        for kind, number, place in actions:
            nbytes = _bytes_of(cut.blocks, remembers, times.paths[number].hops[place].blocks)
            held += nbytes if kind == "forward" else -nbytes
            peak = max(peak, held)
        most[worker] = peak
    return most


@dataclass(frozen=True)
class Stages:
    """The stages of a run's replicas, for the question what each of them keeps."""

    pipeline: Pipeline
    cut: Cut
    task: Task
    seed: int
    batch_size: int
    inner: Inner
    fleet: Fleet

    def require_room(self, who: str, worker: int, room: Sequence[float], rule: int = 0) -> None:
        """Raise `ConfigError` if what that worker keeps for its stage exceeds what it has.

        `room[s]`: bytes that the holders of stage s have, `who` being this one; `rule`: elements of the rule's slots.
        """
        stage = self.pipeline.grid.stage(worker)
        parts = {**self.parts(worker), "rule": FLOAT32_BYTES * rule}
        slots = rule / self.cut.layouts[stage].size
        require_room(who, room[stage], parts, lambda: self._advice(room, slots))

    def parts(self, worker: int) -> dict[str, int]:
        """Return the bytes that a worker keeps for its stage, by name; the rule's slots come on top."""
        pipeline, stage = self.pipeline, self.pipeline.grid.stage(worker)
        follows = [each for each in pipeline.recovery.follows(self.cut) if each.keeper == stage]
        copied = sum(self.cut.layout(each.stage, each.blocks).size for each in follows)
        copies = {"copies": sum(state_bytes(self.inner, copied).values())} if copied else {}
        return {
            **state_bytes(self.inner, self.cut.layouts[stage].size),
            **copies,
            "activations": self._activations.get(worker if pipeline.ways.crosses else stage, 0),
        }

    @cached_property
    def _activations(self) -> dict[int, int]:
        """Return the bytes of activations by worker; of the first row alone if all rows are alike."""
        pipeline = self.pipeline
        replicas = tuple(range(self.fleet.size // pipeline.stages)) if pipeline.ways.crosses else (0,)
        ground = Ground(self.cut, replicas, pipeline.microbatches, pipeline.codec, self.seed, self.fleet)
        times = timetable(pipeline.ways, ground, pipeline.ways.draws(0), pipeline.order)
        remembers = bytes_remembered(self.task, self.seed, self.batch_size // pipeline.microbatches)
        return activation_bytes(self.cut, remembers, times)

    def _advice(self, room: Sequence[float], slots: float) -> str:
        general = "more stages, or more microbatches, which are smaller"
        if self.pipeline.ways.mirrors or self.pipeline.recovery.follows(self.cut):
            return general
        try:
            cuts = fitting_cuts(self.pipeline, self.task, self.seed, self.batch_size, self.inner, room, slots)
        except ConfigError:
            return general
        return f"pipeline.cuts = {list(cuts)}, which fit; {general}"


def fitting_cuts(
    pipeline: Pipeline,
    task: Task,
    seed: int,
    batch_size: int,
    inner: Inner,
    room: Sequence[float],
    slots: float = 0.0,
    *,
    seconds: Sequence[float] | None = None,
    remembers: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Return the `pipeline.cuts` with which the slowest stage is the fastest of those that fit.

    `room[s]`: bytes that stage s has for its state, for so many `slots` of the rule's, and for activations. Blocks take
    `seconds`, or as their operations say, and remember so many bytes, or as their shapes say. Copies of other stages
    are not counted. Raises `ConfigError` if no cuts fit, and as `cut_of`.
    """
    free = pipeline.model_copy(update={"cuts": None})
    if remembers is None:
        remembers = bytes_remembered(task, seed, batch_size // pipeline.microbatches)
    hops = pipeline.stages + (pipeline.head == "first")
    order = "gpipe" if isinstance(pipeline.ways, Skipping) else pipeline.order  # on planned ways it may be all of them

    def fits(stage: int, blocks: Sequence[Block], run: range, head: range) -> bool:
        parameters = sum(blocks[index].parameters for index in (*run, *head))
        state = sum(state_bytes(inner, parameters).values()) + slots * FLOAT32_BYTES * parameters
        held = in_flight(order, pipeline.microbatches, hops, stage) * _bytes_of(blocks, remembers, run)
        needs: float = state + held + (_bytes_of(blocks, remembers, head) if head else 0)
        return needs <= room[stage]

    cut = free.cut(task, seed, batch_size, seconds, fits)
    return tuple(held[0].start for held in cut.held[1:])


class _Fused(TorchFunctionMode):
    """Has attention on the meta device remember what a fused kernel does: on that device torch takes no such kernel."""

    def __torch_function__(
        self, function: Any, types: Collection[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention and len(args) >= 3:
            out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])
            return out
        return function(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _bytes_of(blocks: Sequence[Block], remembers: Sequence[int], run: range) -> int:
    """Return the bytes of a microbatch on a hop through these blocks, with what comes from others and what goes out."""
    received = math.prod(blocks[run.start - 1].shape) if run.start else 0  # the loss may be a hop with no block
    handed_over = math.prod(blocks[run.stop - 1].shape)
    return sum(remembers[index] for index in run) + FLOAT32_BYTES * (received + handed_over)
