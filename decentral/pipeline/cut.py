"""Where a model is cut into stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from decentral.errors import ConfigError, TaskError
from decentral.replica import initial_model
from decentral.state import Layout, layout_of
from decentral.task import Task, to_device

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Block:
    """What is known of a block before anything is computed.

    `cost`: floating point operations of a forward pass in matrix products and convolutions, and one for each element
    that comes out. `shapes` are those of its parameters, `shape` that of what comes out, for one microbatch.
    """

    shapes: tuple[tuple[int, ...], ...]
    cost: float
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(math.prod(shape) for shape in self.shapes)


class Place(NamedTuple):
    """Where a block's parameters lie in its stage's flat vector: elements `start .. stop - 1`."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A model cut into stages: stage s is the blocks `bounds[s] .. bounds[s + 1] - 1`.

    `layouts` say how each stage's parameters lie in its flat vector, `whole` how they lie in the uncut model's.
    """

    blocks: tuple[Block, ...]
    bounds: tuple[int, ...]
    layouts: tuple[Layout, ...]
    whole: Layout

    @property
    def stages(self) -> int:
        return len(self.layouts)

    @property
    def largest(self) -> int:
        """Elements of the largest vector that one stage sends another: activations, or all of its parameters."""
        handed_over = [math.prod(self.shape(stage)) for stage in range(self.stages - 1)]
        return max(*handed_over, *(layout.size for layout in self.layouts))

    def share(self, stage: int) -> float:
        """Return the stage's share of the cost of a local step."""
        return self._cost(stage) / sum(self._cost(other) for other in range(self.stages))

    def shape(self, stage: int) -> tuple[int, ...]:
        """Return the shape of what the stage hands over, for one microbatch."""
        return self.blocks[self.bounds[stage + 1] - 1].shape

    def part(self, task: Task, model: nn.Module, stage: int) -> Part:
        """Return the stage's part of the task's model, which shares its parameters."""
        return _part(task, model, self.bounds, stage)

    def places(self, stage: int) -> list[Place]:
        """Return where the stage's blocks with parameters lie, in order."""
        found, start = [], 0
        for index in range(self.bounds[stage], self.bounds[stage + 1]):
            block = self.blocks[index]
            if block.shapes:
                found.append(Place(index, start, start + block.parameters))
                start += block.parameters
        return found

    def counterpart(self, block: int, stage: int, other: int) -> int | None:
        """Return where that block of the stage has its like in the stage `other`: the first element; None: nowhere.

        Of blocks whose parameters have the same shapes the first corresponds to the first, the last to the last.
        """
        shapes = self.blocks[block].shapes
        mine, theirs = (
            [place for place in self.places(which) if self.blocks[place.block].shapes == shapes]
            for which in (stage, other)
        )
        if not theirs:
            return None
        ordinal = [place.block for place in mine].index(block)
        return theirs[round(ordinal * (len(theirs) - 1) / max(1, len(mine) - 1))].start

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parameters of the whole model `[P]`, given every stage's, by stage."""
        whole, places = torch.empty(self.whole.size), {entry.name: entry for entry in self.whole.entries}
        for layout, values in zip(self.layouts, parts, strict=True):
            for entry in layout.entries:
                place = places[entry.name]
                whole[place.start : place.stop] = values[entry.start : entry.stop]
        return whole

    def _cost(self, stage: int) -> float:
        return sum(block.cost for block in self.blocks[self.bounds[stage] : self.bounds[stage + 1]])


class Part(nn.Module):
    """Some blocks of a model, run one after the other. Parameters have the names that they have in the model."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], chosen: range) -> None:
        super().__init__()
        names = {id(module): name for name, module in model.named_modules()}
        for index in chosen:
            _place(self, names.get(id(blocks[index])) or f"block {index}", blocks[index])
        self._run = [blocks[index] for index in chosen]

    def forward(self, values: Tensor) -> Tensor:
        for block in self._run:
            values = block(values)
        return values


def _place(parent: nn.Module, path: str, block: nn.Module) -> None:
    """Make the block a descendant of `parent` at the path, with empty modules where there are none."""
    *above, name = path.split(".")
    for step in above:
        if step not in parent._modules:
            parent.add_module(step, nn.Module())
        parent = parent.get_submodule(step)
    parent.add_module(name, block)


class Inputs(nn.Module):
    """Stands for the task's model to learn what it is called on: `of` returns that."""

    def of(self, task: Task, batch: Any) -> Tensor:
        """Return the tensor on which the task's loss calls the model; raises `TaskError` if it is not one tensor."""
        try:
            task.loss(self, batch)
        except _Called as call:
            return call.values
        raise TaskError("task.loss() does not call the model, so a pipeline does not know what goes into it")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise TaskError(
                "task.loss() calls the model on something else than one tensor, and stages hand over one tensor alone"
            )
        raise _Called(args[0])


class _Called(BaseException):
    """Carries what the model was called on out of `task.loss`; no error, so that nobody takes it for one."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def survey(task: Task, model: nn.Module, samples: int) -> list[Block]:
    """Return the blocks of the task's model (on the meta device) with their costs for a microbatch of `samples`.

    Nothing is computed. Raises `TaskError` for a model that cannot be cut, naming the block.
    """
    blocks = task.blocks(model)
    _require_sequence(model, blocks)
    with torch.no_grad():
        values = Inputs().of(task, to_device(task.batch(0, 0, samples), META))
        found = []
        for index, block in enumerate(blocks):
            with FlopCounterMode(display=False) as counter:
                values = _called(block, index, values)
            shapes = tuple(tuple(parameter.shape) for parameter in block.parameters() if parameter.requires_grad)
            found.append(Block(shapes, counter.get_total_flops() + values.numel(), tuple(values.shape)))
    return found


def cut_of(task: Task, seed: int, samples: int, stages: int, cuts: Sequence[int] | None) -> Cut:
    """Return how the task's model is cut into `stages`, for microbatches of so many samples.

    At `cuts`, or where the slowest stage is the fastest. The same on every worker, for nothing is measured. Raises
    `TaskError` for a model that cannot be cut and `ConfigError` for stages that it has not.
    """
    with META:
        model = initial_model(task, seed)
    blocks = survey(task, model, samples)
    able = sum(1 for block in blocks if block.parameters)
    if stages > able:
        raise ConfigError(f"pipeline.stages: {stages}, but the model has only {able} blocks with parameters")
    if cuts is None:
        bounds = _balanced(blocks, stages)
    else:
        bounds = (0, *cuts, len(blocks))
        for stage, (start, stop) in enumerate(pairwise(bounds)):
            if not any(block.parameters for block in blocks[start:stop]):
                raise ConfigError(
                    f"pipeline.cuts: stage {stage} is the blocks {start} to {stop - 1} of {len(blocks)}, in which "
                    "there are no parameters"
                )
    _require_own_parameters(task, model, bounds)
    layouts = tuple(layout_of(_part(task, model, bounds, stage)) for stage in range(stages))
    return Cut(tuple(blocks), bounds, layouts, layout_of(model))


def _part(task: Task, model: nn.Module, bounds: Sequence[int], stage: int) -> Part:
    return Part(model, task.blocks(model), range(bounds[stage], bounds[stage + 1]))


def _called(block: nn.Module, index: int, values: Tensor) -> Tensor:
    try:
        values = block(values)
    except Exception as error:
        raise TaskError(
            f"block {index} of the model, {type(block).__name__}, cannot take what comes: {error}"
        ) from error
    if not isinstance(values, Tensor):
        raise TaskError(
            f"block {index} of the model, {type(block).__name__}, returns a {type(values).__name__}; stages hand over "
            "one tensor alone"
        )
    return values


def _balanced(blocks: Sequence[Block], stages: int) -> tuple[int, ...]:
    """Return bounds of so many stages, each with parameters, whose largest cost is the least; of equal ones the first.

    By dynamic programming: best[s][b] is the largest cost when the first b blocks make s stages.
    """
    count = len(blocks)
    costs, parameters = [0.0], [0]
    for block in blocks:
        costs.append(costs[-1] + block.cost)
        parameters.append(parameters[-1] + block.parameters)
    best: list[list[tuple[float, int]]] = [[(math.inf, 0)] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = (0.0, 0)
    for stage in range(1, stages + 1):
        for stop in range(1, count + 1):
            options = [
                (max(best[stage - 1][start][0], costs[stop] - costs[start]), start)
                for start in range(stop)
                if parameters[stop] > parameters[start]
            ]
            best[stage][stop] = min(options, default=(math.inf, 0))
    bounds = [count]
    for stage in range(stages, 0, -1):
        bounds.append(best[stage][bounds[-1]][1])
    return tuple(reversed(bounds))


def _require_sequence(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in within:
            raise TaskError(f"task.blocks(): parameter '{name}' of the model is in no block")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise TaskError(
                f"module '{name}' normalises over a batch, and a pipeline sees microbatches alone; take a "
                "normalisation over each sample (nn.LayerNorm, nn.GroupNorm)"
            )


def _require_own_parameters(task: Task, model: nn.Module, bounds: Sequence[int]) -> None:
    """No parameter may be tied to one of another stage: each stage has its optimiser."""
    blocks, names = task.blocks(model), {id(parameter): name for name, parameter in model.named_parameters()}
    holder: dict[int, int] = {}
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        for parameter in {id(p) for block in blocks[start:stop] for p in block.parameters() if p.requires_grad}:
            if holder.setdefault(parameter, stage) != stage:
                raise TaskError(
                    f"parameter '{names[parameter]}' is used in the stages {holder[parameter]} and {stage}; tied "
                    "weights must lie in one stage: untie them, or set pipeline.cuts so that they do"
                )
