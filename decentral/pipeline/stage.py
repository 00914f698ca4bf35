"""One worker's stage of a model: forward and back through a microbatch, at real tensors or at sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from decentral.errors import Diverged, TaskError
from decentral.grid import Grid
from decentral.inner import Inner
from decentral.phantom import Phantom
from decentral.pipeline.cut import Cut, Inputs
from decentral.pipeline.paths import Path
from decentral.pipeline.recovery import Neighbour, Recovery
from decentral.replica import (
    PhantomReplica,
    Replica,
    Spans,
    TorchReplica,
    begin_draws,
    evaluate,
    initial_model,
    load_params,
)
from decentral.task import Task, to_device

LOSS = "loss"
"""What the task's loss draws for: the first hop asks it for what goes into the model, the last one for the loss."""


class Copied(NamedTuple):
    """What another stage has kept of some blocks: parameters and the inner optimiser's running means, `[n]` each.

    `steps`: how many the inner optimiser believes it has done; `lr`: its peak learning rate; `slots`: what the sync
    rule keeps, `[n]` each, if that is kept too.
    """

    blocks: tuple[int, ...]
    vectors: tuple[Tensor, ...]
    steps: int
    lr: float
    slots: Mapping[str, Tensor]


class Stage(Replica, Protocol):
    """What a `Line` trains: a `Replica` of one stage's parameters that goes through a batch in microbatches.

    What stages hand over has the shape `cut.shape`; here it is flat, `[n]` float32.
    """

    cut: Cut
    stage: int
    microbatches: int

    @property
    def room_bytes(self) -> int: ...
    def begin(self) -> None: ...
    def forward(self, step: int, path: Path, place: int, received: Tensor | None) -> Tensor | None: ...
    def go_back(self, path: Path, place: int, gradient: Tensor | None) -> Tensor | None: ...
    def mean_loss(self, step: int) -> float | None: ...
    def squared_norm(self) -> float: ...
    def replica_of(self, stage: int, blocks: Sequence[int]) -> Replica: ...
    def begin_anew(self, recovery: Recovery, neighbours: Sequence[Neighbour], copied: Copied | None) -> None: ...
    def evaluate_whole(self, parts: list[Tensor]) -> dict[str, float]: ...


class TorchStage(TorchReplica):
    """A stage of a real model, held by `worker` of the grid.

    Of the whole model as everybody starts it the stage's blocks are taken and the others dropped. Every random draw
    depends on (seed, replica, step, microbatch, block) alone.
    """

    def __init__(
        self,
        task: Task,
        inner: Inner,
        cut: Cut,
        *,
        worker: int,
        seed: int,
        batch_size: int,
        microbatches: int,
        total_steps: int,
        device: torch.device | None = None,
    ) -> None:
        grid = Grid(cut.stages)
        self.cut, self.stage, self.microbatches = cut, grid.stage(worker), microbatches
        super().__init__(
            task,
            inner,
            worker=grid.replica(worker),
            seed=seed,
            batch_size=batch_size,
            total_steps=total_steps,
            device=device,
            model=cut.part(task, initial_model(task, seed), cut.of(self.stage)),
        )
        self._under_way: dict[tuple[int, int, int], tuple[Tensor | None, Tensor]] = {}  # what came in, and went out
        self._losses: list[Tensor] = []
        self._drawing = {index for index, block in enumerate(cut.blocks) if block.draws}
        if self._drawing:
            self._drawing.add(len(cut.blocks))  # what the loss draws behind the model, too, is the same with any cut
        self._usual_lr = inner.lr

    @property
    def room_bytes(self) -> int:
        """Bytes that one other stage may have sent before this one has asked for them."""
        return _room_bytes(self.cut, self.microbatches)

    def begin(self) -> None:
        """Forget what is left of a batch, and begin the next one with a gradient of zero."""
        self._under_way.clear()
        self._losses.clear()
        self._model_grads.zero_()

    def forward(self, step: int, path: Path, place: int, received: Tensor | None) -> Tensor | None:
        """Go forward through a hop of a microbatch's path, in local step `step`.

        `received` is what the hop before handed over; None at the first. Returns what the next one takes, None at the
        last, which asks for the loss. Raises `TaskError` if the task raises.
        """
        start, ends = path.hops[place].start, place in (0, len(path.hops) - 1)
        self._begin_draws(step, path, LOSS if ends else start)
        values = None
        if received is not None:
            values = received.to(self.device).view(self.cut.shape(start)).requires_grad_()
        out = self._through(step, path, place, values)
        self._under_way[path.replica, path.microbatch, place] = values, out
        if place == len(path.hops) - 1:
            self._losses.append(out.detach())
            return None
        return out.detach().view(-1)

    def go_back(self, path: Path, place: int, gradient: Tensor | None) -> Tensor | None:
        """Go back through a hop, adding to `grads`; return the gradient of what was received, None at the first hop.

        `gradient` is that of what was handed over; None at the last hop. The loss is the mean over microbatches.
        """
        values, out = self._under_way.pop((path.replica, path.microbatch, place))
        if gradient is None:
            (out / self.microbatches).backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward(out, gradient.to(self.device).view(out.shape))
        if values is None:
            return None
        assert values.grad is not None
        return values.grad.view(-1)

    def mean_loss(self, step: int) -> float | None:
        """Return the mean loss of the microbatches that end here, None if none do; raises `Diverged` if not finite."""
        if not self._losses:
            return None
        loss = float(torch.stack(self._losses).mean())
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise Diverged(
                f"replica {self.worker}: the loss of local step {step} is {loss}; lower inner.lr, set inner.clip_norm, "
                "or look at the batch of that step"
            )
        return loss

    def squared_norm(self) -> float:
        """Return the sum of the gradient's squares: this stage's share of the whole one's."""
        return float(self._model_grads.double().square().sum())

    def replica_of(self, stage: int, blocks: Sequence[int]) -> TorchReplica:
        """Return those blocks of another stage as the run begins with them, with an inner optimiser of their own."""
        return TorchReplica(
            self.task,
            self.inner.model_copy(update={"lr": self._usual_lr}),
            worker=self.worker,
            seed=self.seed,
            batch_size=self.batch_size,
            total_steps=self.total_steps,
            device=self.device,
            model=self.cut.part(self.task, initial_model(self.task, self.seed), blocks),
        )

    def begin_anew(self, recovery: Recovery, neighbours: Sequence[Neighbour], copied: Copied | None) -> None:
        """Begin with what `recovery` makes of the neighbours' stages, and with what another stage has `copied`.

        The inner optimiser is fresh, and steps at the learning rate that `recovery` says, unless there are copies of
        all blocks and so of its state.
        """
        model = self.cut.part(self.task, initial_model(self.task, self.seed), self.cut.of(self.stage))
        self.params.copy_(
            torch.cat([values.detach().flatten() for values in model.parameters() if values.requires_grad])
        )
        recovery.rebuild(self.params, self.cut, self.stage, neighbours, () if copied is None else copied.blocks)
        held = state_of(self)
        for values in held[1:]:
            values.zero_()
        self.set_inner_steps(0)
        self.set_learning_rate(self._usual_lr * recovery.bump)
        if copied is None:
            return
        spans = self.cut.spans(self.stage, copied.blocks)
        if recovery.keeps_all:
            self.set_inner_steps(copied.steps)
            self.set_learning_rate(copied.lr)
        for values, kept in zip(held, copied.vectors if recovery.keeps_all else copied.vectors[:1], strict=False):
            scatter(values, spans, kept)

    def evaluate_whole(self, parts: list[Tensor]) -> dict[str, float]:
        """Return the task's held-out metrics of the whole model, given every stage's parameters, by stage."""
        model = initial_model(self.task, self.seed)
        load_params(model, self.cut.assemble(parts))
        return evaluate(self.task, model.to(self.device))

    def _through(self, step: int, path: Path, place: int, values: Tensor | None) -> Tensor:
        """Return what a hop makes of a microbatch: activations, or the loss at the last one."""
        run, last = path.hops[place].blocks, place == len(path.hops) - 1

        def begin(index: int) -> None:
            if index in self._drawing:
                self._begin_draws(step, path, index)

        try:
            if values is not None and not last:
                return self.model(values, run, begin)  # type: ignore[no-any-return]
            batch = to_device(self._microbatch(step, path), self.device)
            if values is None:
                values = Inputs().of(self.task, batch)
                if not last:
                    return self.model(values, run, begin)  # type: ignore[no-any-return]
            return self.task.loss(_Rest(self.model, run, values, begin), batch)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                f"replica {self.worker}, stage {self.stage}: the task raised at local step {step}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _begin_draws(self, step: int, path: Path, what: int | str) -> None:
        """Draw for a block of a microbatch's way, or for the loss, what any other cut draws for it."""
        begin_draws(self.device, self.seed, "microbatch", path.replica, step, path.microbatch, what)

    def _microbatch(self, step: int, path: Path) -> Any:
        stream, start = self._samples_of(path.replica, step)
        size = self.batch_size // self.microbatches
        return self.task.batch(stream, start + path.microbatch * size, size)


class _Rest(nn.Module):
    """Stands for the task's model when its loss is asked for and the hops before have done their part."""

    def __init__(self, model: nn.Module, run: range, values: Tensor, begin: Callable[[int], None]) -> None:
        super().__init__()
        self.model, self._run, self._values, self._begin = model, run, values, begin

    def forward(self, _inputs: Tensor) -> Tensor:
        out: Tensor = self.model(self._values, self._run, self._begin)
        self._begin(self._run.stop)
        return out


class PhantomStage(PhantomReplica):
    """A stage without elements, for timing-only simulation."""

    def __init__(self, cut: Cut, stage: int, microbatches: int, batch_size: int, inner: Inner) -> None:
        super().__init__(cut.layouts[stage], batch_size, inner)
        self.cut, self.stage, self.microbatches = cut, stage, microbatches

    @property
    def room_bytes(self) -> int:
        return _room_bytes(self.cut, self.microbatches)

    def begin(self) -> None:
        return None

    def forward(self, step: int, path: Path, place: int, received: Tensor | None) -> Tensor | None:
        return self._activations(path.hops[place].stop) if place + 1 < len(path.hops) else None

    def go_back(self, path: Path, place: int, gradient: Tensor | None) -> Tensor | None:
        return self._activations(path.hops[place].start) if place else None

    def mean_loss(self, step: int) -> float | None:
        return None

    def squared_norm(self) -> float:
        return 0.0

    def replica_of(self, stage: int, blocks: Sequence[int]) -> PhantomReplica:
        return PhantomReplica(self.cut.layout(stage, blocks), self.batch_size, self.inner)

    def begin_anew(self, recovery: Recovery, neighbours: Sequence[Neighbour], copied: Copied | None) -> None:
        return None

    def evaluate_whole(self, parts: list[Tensor]) -> dict[str, float]:
        return {}

    def _activations(self, stop: int) -> Tensor:
        return Phantom(torch.Size(self.cut.shape(stop)).numel())  # type: ignore[return-value]


def state_of(replica: Replica) -> list[Tensor]:
    """Return a replica's parameters and the running means that its inner optimiser keeps, live, `[P]` each."""
    inner = replica.inner
    return [replica.params, *(replica.inner_state(name) for name in (*inner.momenta, *inner.variances))]


def gather(values: Tensor, spans: Spans) -> Tensor:
    """Return the elements of a flat vector that lie in the spans, one after the other; a copy."""
    return torch.cat([values[start:stop] for start, stop in spans])


def scatter(values: Tensor, spans: Spans, parts: Tensor) -> None:
    """Put the elements that `gather` returned back where they were."""
    place = 0
    for start, stop in spans:
        values[start:stop] = parts[place : place + stop - start]
        place += stop - start


def _room_bytes(cut: Cut, microbatches: int) -> int:
    """Return the bytes of a batch's activations and gradients in float32, on ways that may come by twice, and of a
    stage's parameters with what its optimiser keeps."""
    return 4 * (4 * microbatches + 4) * cut.largest
