"""Where a model is cut into stages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from decentral.errors import ConfigError, TaskError
from decentral.replica import Spans, initial_model
from decentral.state import Layout, layout_of
from decentral.task import Task, to_device

META = torch.device("meta")
Fits = Callable[[int, Sequence["Block"], range, range], bool]
"""Whether a stage of that number fits, given the model's blocks, which of them it has, and which it has of the head."""


@dataclass(frozen=True, slots=True)
class Block:
    """What is known of a block before anything is computed.

    `cost`: floating point operations of a forward pass in matrix products and convolutions, and one for each element
    that comes out. `shapes` are those of its parameters, `takes` and `shape` those of what goes in and comes out, for
    one microbatch. `draws`: whether it draws random numbers, as dropout does.
    """

    shapes: tuple[tuple[int, ...], ...]
    cost: float
    takes: tuple[int, ...]
    shape: tuple[int, ...]
    draws: bool = False

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
    """A model cut into stages: stage s holds the blocks of the ranges `held[s]`, which is one range of them but for a
    first stage that has the model's head as well, be it the loss alone.

    `trunk` are the blocks from the first to the last of those that are alike: a transformer's, without embedding and
    head. `layouts` say how each stage's parameters lie in its flat vector, `whole` how they lie in the uncut model's.
    """

    blocks: tuple[Block, ...]
    held: tuple[tuple[range, ...], ...]
    trunk: range
    layouts: tuple[Layout, ...]
    whole: Layout

    @property
    def stages(self) -> int:
        return len(self.layouts)

    @property
    def largest(self) -> int:
        """Elements of the largest vector that one stage sends another: activations, or all of its parameters."""
        seams = {run.start for runs in self.held for run in runs} | {self.trunk.start, self.trunk.stop}
        handed_over = [math.prod(self.shape(seam)) for seam in seams if 0 < seam < len(self.blocks)]
        return max(*handed_over, *(layout.size for layout in self.layouts))

    def share(self, blocks: Iterable[int]) -> float:
        """Return those blocks' share of the cost of a local step."""
        return sum(self.blocks[index].cost for index in blocks) / sum(block.cost for block in self.blocks)

    def shape(self, stop: int) -> tuple[int, ...]:
        """Return the shape of what the blocks before block `stop` make of one microbatch."""
        return self.blocks[stop - 1].shape

    def of(self, stage: int) -> list[int]:
        """Return the stage's blocks, in order."""
        return [index for run in self.held[stage] for index in run]

    def middle(self, stage: int) -> range:
        """Return those of the stage's blocks that lie in the trunk; empty if none do."""
        run = self.held[stage][0]
        return range(max(run.start, self.trunk.start), min(run.stop, self.trunk.stop))

    def outside(self, stage: int) -> list[range]:
        """Return the stage's blocks that lie before the trunk, and those that lie behind it, where there are any."""
        runs = [
            part
            for run in self.held[stage]
            for part in (
                range(run.start, min(run.stop, self.trunk.start)),
                range(max(run.start, self.trunk.stop), run.stop),
            )
        ]
        return [run for run in runs if run]

    def ends(self, stage: int) -> list[int]:
        """Return the stage's blocks with parameters that have no like: those outside of the trunk."""
        return [index for run in self.outside(stage) for index in run if self.blocks[index].shapes]

    def require_any_order(self) -> None:
        """Raise `ConfigError` if microbatches cannot go through the stages' middles in any order."""
        shape = self.blocks[self.trunk.start].takes
        for stage in range(self.stages):
            middle = self.middle(stage)
            if not middle:
                raise ConfigError(
                    f"pipeline.cuts: stage {stage} has none of the model's blocks {self.trunk.start} to "
                    f"{self.trunk.stop - 1}, which are alike, and pipeline.paths leads through those of each stage"
                )
            for seen in (self.blocks[middle.start].takes, self.shape(middle.stop)):
                if seen != shape:
                    raise ConfigError(
                        f"pipeline.paths: stages in another order must hand over the same shapes, and stage {stage} "
                        f"has {seen} where others have {shape}"
                    )

    def part(self, task: Task, model: nn.Module, blocks: Sequence[int]) -> Part:
        """Return those blocks of the task's model, which share its parameters."""
        return Part(model, task.blocks(model), blocks)

    def places(self, stage: int) -> list[Place]:
        """Return where the stage's blocks with parameters lie, in order."""
        found, start = [], 0
        for index in self.of(stage):
            block = self.blocks[index]
            if block.shapes:
                found.append(Place(index, start, start + block.parameters))
                start += block.parameters
        return found

    def spans(self, stage: int, blocks: Collection[int]) -> Spans:
        """Return where these blocks of the stage lie in its flat vector, in order."""
        return tuple((place.start, place.stop) for place in self.places(stage) if place.block in blocks)

    def layout(self, stage: int, blocks: Collection[int]) -> Layout:
        """Return how the parameters of these blocks lie one after the other."""
        entries, size = [], 0
        for start, stop in self.spans(stage, blocks):
            for entry in self.layouts[stage].entries:
                if start <= entry.start < stop:
                    length = entry.stop - entry.start
                    entries.append(replace(entry, start=size, stop=size + length))
                    size += length
        return Layout(tuple(entries))

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


class Part(nn.Module):
    """Some blocks of a model. Parameters have the names that they have in the model."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], chosen: Sequence[int]) -> None:
        super().__init__()
        names = {id(module): name for name, module in model.named_modules()}
        self._blocks = {index: blocks[index] for index in chosen}
        for index, block in self._blocks.items():
            for path, module in _holders(block, names, f"block {index}"):
                _place(self, path, module)

    def train(self, mode: bool = True) -> Part:
        """Set the mode of the blocks too that are no modules of the model but made of them."""
        super().train(mode)
        for block in self._blocks.values():
            block.train(mode)
        return self

    def forward(self, values: Tensor, run: range, begin: Callable[[int], None] = lambda index: None) -> Tensor:
        """Return what the blocks of `run`, one after the other, make of the values; `begin` is told of each before."""
        for index in run:
            begin(index)
            values = self._blocks[index](values)
        return values


def _holders(block: nn.Module, names: Mapping[int, str], path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold what the block has, each with its name in the model, or below `path` if it has none.

    A block that the model does not know, and that holds no tensor itself, is made of others, which the model may know.
    """
    if name := names.get(id(block)):
        yield name, block
    elif [*block.parameters(recurse=False), *block.buffers(recurse=False)] or not [*block.children()]:
        yield path, block
    else:
        for child, module in block.named_children():
            yield from _holders(module, names, f"{path}.{child}")


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
        found: list[Block] = []
        seen: set[int] = set()  # what is tied belongs to the first block that has it
        for index, block in enumerate(blocks):
            takes, own = (
                tuple(values.shape),
                [each for each in block.parameters() if each.requires_grad and id(each) not in seen],
            )
            seen |= {id(parameter) for parameter in own}
            with FlopCounterMode(display=False) as counter, _Draws() as draws:  # type: ignore[no-untyped-call]
                values = _called(block, index, values)
            shapes = tuple(tuple(parameter.shape) for parameter in own)
            cost = counter.get_total_flops() + values.numel()
            found.append(Block(shapes, cost, takes, tuple(values.shape), draws.any))
    return found


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether any operator draws random numbers."""

    any = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= torch.Tag.nondeterministic_seeded in operator.tags
        return operator(*args, **(kwargs or {}))


def cut_of(
    task: Task,
    seed: int,
    samples: int,
    stages: int,
    cuts: Sequence[int] | None = None,
    *,
    head: Literal["last", "first"] = "last",
    alike: bool = False,
    seconds: Sequence[float] | None = None,
    fits: Fits | None = None,
) -> Cut:
    """Return how the task's model is cut into `stages`, for microbatches of so many samples.

    At `cuts`; or so that all stages have as many of the trunk's blocks if they are to be `alike`; or where the slowest
    stage is the fastest: by counted operations, so that it is the same on every worker, or by the `seconds` that each
    block takes; of cuts alone whose stages `fits` takes. `head`: which stage has the blocks behind the trunk. Raises
    `TaskError` for a model that cannot be cut, and `ConfigError` for stages that it has not or of which none fit.
    """
    with META:
        model = initial_model(task, seed)
    blocks = survey(task, model, samples)
    if seconds is not None:
        blocks = [replace(block, cost=taken) for block, taken in zip(blocks, seconds, strict=True)]
    able = sum(1 for block in blocks if block.parameters)
    if stages > able:
        raise ConfigError(f"pipeline.stages: {stages}, but the model has only {able} blocks with parameters")
    trunk, starts = _trunk(blocks)
    stop = trunk.stop if head == "first" else len(blocks)
    if head == "first" and len(starts) < stages:
        raise ConfigError(
            f"pipeline.stages: {stages}, but the model has only {len(starts)} blocks that are alike, and with "
            'pipeline.head = "first" each stage needs one of them'
        )
    if cuts is not None:
        bounds = (0, *cuts, stop)
    elif alike:
        bounds = (0, *_equal(starts, stages), stop)
    else:
        bounds = _balanced(blocks, stop, stages, fits)
    held = [(range(*pair),) for pair in pairwise(bounds)]
    for stage, (run,) in enumerate(held):
        if not any(blocks[index].parameters for index in run if index < len(blocks)):
            raise ConfigError(
                f"pipeline.cuts: stage {stage} is the blocks {run.start} to {run.stop - 1} of {stop}, in which there "
                "are no parameters"
            )
    if head == "first":
        held[0] = (*held[0], range(stop, len(blocks)))  # type: ignore[assignment]
    stages_of = [[index for run in runs for index in run] for runs in held]
    _require_own_parameters(task, model, stages_of)
    layouts = tuple(layout_of(Part(model, task.blocks(model), chosen)) for chosen in stages_of)
    return Cut(tuple(blocks), tuple(held), trunk, layouts, layout_of(model))


def _trunk(blocks: Sequence[Block]) -> tuple[range, list[int]]:
    """Return the blocks from the first to the last of those that are alike, and which ones these are.

    Alike are those whose parameters have the same shapes; of several kinds the one with the most blocks counts, of as
    many the first. To the last one belongs what follows each of the others without parameters, such as an activation.
    """
    kinds = Counter(block.shapes for block in blocks if block.shapes)
    most = max(kinds, key=lambda shapes: kinds[shapes])
    starts = [index for index, block in enumerate(blocks) if block.shapes == most]
    stop = starts[-1] + 1
    gap = min((after - before - 1 for before, after in pairwise(starts)), default=0)
    while stop < len(blocks) and not blocks[stop].shapes and stop - starts[-1] <= gap:
        stop += 1
    return range(starts[0], stop), starts


def _equal(starts: Sequence[int], stages: int) -> list[int]:
    """Return the first block of each stage but the first, each with as many of the blocks at `starts`."""
    each, left = divmod(len(starts), stages)
    if left:
        raise ConfigError(
            f"pipeline.stages: {len(starts)} blocks of the model are alike, which {stages} stages cannot share equally "
            "as mirrors of one another do; take another number of stages, or set pipeline.cuts"
        )
    return [starts[stage * each] for stage in range(1, stages)]


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


def _balanced(blocks: Sequence[Block], count: int, stages: int, fits: Fits | None) -> tuple[int, ...]:
    """Return bounds of so many stages, each with parameters, whose largest cost is the least; of equal ones the first.

    Of the first `count` blocks; the first stage has the others, the head, besides. By dynamic programming: best[s][b]
    is the largest cost when the first b blocks make s stages that fit.
    """
    rest = range(count, len(blocks))
    head = sum(blocks[index].cost for index in rest)
    costs, parameters = [0.0], [0]
    for block in blocks[:count]:
        costs.append(costs[-1] + block.cost)
        parameters.append(parameters[-1] + block.parameters)
    best: list[list[tuple[float, int]]] = [[(math.inf, 0)] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = (0.0, 0)
    for stage in range(1, stages + 1):
        for stop in range(1, count + 1):
            options = [
                (max(best[stage - 1][start][0], costs[stop] - costs[start] + (head if stage == 1 else 0)), start)
                for start in range(stop)
                if parameters[stop] > parameters[start]
                and (fits is None or fits(stage - 1, blocks, range(start, stop), rest if stage == 1 else range(0)))
            ]
            best[stage][stop] = min(options, default=(math.inf, 0))
    if best[stages][count][0] == math.inf:
        raise ConfigError(
            f"pipeline.stages: no cuts of the model into {stages} stages fit into memory; take more stages, or more "
            "microbatches, which are smaller"
        )
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


def _require_own_parameters(task: Task, model: nn.Module, stages: Sequence[Sequence[int]]) -> None:
    """No parameter may be tied to one of another stage: each stage has its optimiser."""
    blocks, names = task.blocks(model), {id(parameter): name for name, parameter in model.named_parameters()}
    holder: dict[int, int] = {}
    for stage, chosen in enumerate(stages):
        held = [blocks[index] for index in chosen]
        for parameter in {id(each) for block in held for each in block.parameters() if each.requires_grad}:
            if holder.setdefault(parameter, stage) != stage:
                raise TaskError(
                    f"parameter '{names[parameter]}' is used in the stages {holder[parameter]} and {stage}; tied "
                    "weights must lie in one stage: untie them, set pipeline.cuts so that they do, or pipeline.head = "
                    '"first" if they are those of embedding and head'
                )
