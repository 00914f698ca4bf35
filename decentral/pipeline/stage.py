"""One worker's stage of a model: forward and back through a microbatch, at real tensors or at sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from decentral.errors import TaskError
from decentral.grid import Grid
from decentral.inner import Inner
from decentral.phantom import Phantom
from decentral.pipeline.cut import Cut, Inputs
from decentral.pipeline.recovery import Neighbour, Recovery
from decentral.replica import PhantomReplica, Replica, TorchReplica, evaluate, initial_model, load_params, seed_of
from decentral.task import Task, to_device


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
    def forward(self, step: int, microbatch: int, received: Tensor | None) -> Tensor | None: ...
    def go_back(self, microbatch: int, gradient: Tensor | None) -> Tensor | None: ...
    def mean_loss(self, step: int) -> float | None: ...
    def squared_norm(self) -> float: ...
    def update_with(self, step: int, norm: float) -> None: ...
    def begin_anew(self, recovery: Recovery, neighbours: Sequence[Neighbour]) -> None: ...
    def evaluate_whole(self, parts: list[Tensor]) -> dict[str, float]: ...


class TorchStage(TorchReplica):
    """A stage of a real model. Worker `worker` of the grid; batches are those of its replica.

    `model` is the whole model as everybody starts it, of which the stage's blocks are taken and the others dropped.
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
            model=cut.part(task, initial_model(task, seed), self.stage),
        )
        self._under_way: dict[int, tuple[Tensor | None, Tensor]] = {}  # by microbatch: what came in, and went out
        self._losses: list[Tensor] = []
        self._usual_lr = inner.lr

    @property
    def room_bytes(self) -> int:
        """Bytes that one other stage may have sent before this one has asked for them."""
        return _room_bytes(self.cut, self.microbatches)

    @property
    def last(self) -> bool:
        return self.stage == self.cut.stages - 1

    def begin(self) -> None:
        """Forget what is left of a batch, and begin the next one with a gradient of zero."""
        self._under_way.clear()
        self._losses.clear()
        self._model_grads.zero_()

    def forward(self, step: int, microbatch: int, received: Tensor | None) -> Tensor | None:
        """Go forward through a microbatch of local step `step`; return what the next stage takes, None from the last.

        `received` is what the stage before handed over; None at the first. Raises `TaskError` if the task raises.
        """
        seed = seed_of(self.seed, "microbatch", self.worker, step, microbatch, self.stage)
        torch.manual_seed(seed) if self.device.type != "cpu" else torch.default_generator.manual_seed(seed)
        values = None
        if received is not None:
            values = received.to(self.device).view(self.cut.shape(self.stage - 1)).requires_grad_()
        out = self._through(step, microbatch, values)
        self._under_way[microbatch] = values, out
        if self.last:
            self._losses.append(out.detach())
            return None
        return out.detach().view(-1)

    def go_back(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """Go back through a microbatch, adding to `grads`; return the gradient of what was received, None at the first.

        `gradient` is that of what was handed over; None at the last stage, whose loss is the mean over microbatches.
        """
        values, out = self._under_way.pop(microbatch)
        if gradient is None:
            (out / self.microbatches).backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward(out, gradient.to(self.device).view(out.shape))
        if values is None:
            return None
        assert values.grad is not None
        return values.grad.view(-1)

    def mean_loss(self, step: int) -> float | None:
        """Return the mean loss of the batch at the last stage, None at others. Raises `TaskError` if not finite."""
        if not self.last:
            return None
        loss = float(torch.stack(self._losses).mean())
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise TaskError(
                f"replica {self.worker}: the loss of local step {step} is {loss}; lower inner.lr, set inner.clip_norm, "
                "or look at the batch of that step"
            )
        return loss

    def squared_norm(self) -> float:
        """Return the sum of the gradient's squares: this stage's share of the whole one's."""
        return float(self._model_grads.double().square().sum())

    def update_with(self, step: int, norm: float) -> None:
        """One step of the inner optimiser, which clips by the norm of the whole model's gradient."""
        self.inner.step(self.optimizer, step, self.total_steps, norm)

    def begin_anew(self, recovery: Recovery, neighbours: Sequence[Neighbour]) -> None:
        """Begin with what `recovery` makes of the neighbours' stages; raises `PeerGone` if it cannot.

        The inner optimiser is fresh, and steps at the learning rate that `recovery` says.
        """
        self.params.copy_(recovery.rebuilt(self.cut, self.stage, neighbours))
        for name in (*self.inner.momenta, *self.inner.variances):
            self.inner_state(name).zero_()
        self.set_inner_steps(0)
        self.set_learning_rate(self._usual_lr * recovery.bump)

    def evaluate_whole(self, parts: list[Tensor]) -> dict[str, float]:
        """Return the task's held-out metrics of the whole model, given every stage's parameters, by stage."""
        model = initial_model(self.task, self.seed)
        load_params(model, self.cut.assemble(parts))
        return evaluate(self.task, model.to(self.device))

    def _through(self, step: int, microbatch: int, values: Tensor | None) -> Tensor:
        """Return what the stage makes of a microbatch: activations, or the loss at the last stage."""
        try:
            if values is not None and not self.last:
                return self.model(values)  # type: ignore[no-any-return]
            batch = to_device(self._microbatch(step, microbatch), self.device)
            if values is None:
                values = Inputs().of(self.task, batch)
                if not self.last:
                    return self.model(values)  # type: ignore[no-any-return]
            return self.task.loss(_Rest(self.model, values), batch)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                f"replica {self.worker}, stage {self.stage}: the task raised at local step {step}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _microbatch(self, step: int, microbatch: int) -> Any:
        stream, start = self._samples_of(self.worker, step)
        size = self.batch_size // self.microbatches
        return self.task.batch(stream, start + microbatch * size, size)


class _Rest(nn.Module):
    """Stands for the task's model when its loss is asked for and the stages before have done their part."""

    def __init__(self, model: nn.Module, values: Tensor) -> None:
        super().__init__()
        self.model, self._values = model, values

    def forward(self, _inputs: Tensor) -> Tensor:
        out: Tensor = self.model(self._values)
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

    def forward(self, step: int, microbatch: int, received: Tensor | None) -> Tensor | None:
        return self._activations(self.stage) if self.stage < self.cut.stages - 1 else None

    def go_back(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        return self._activations(self.stage - 1) if self.stage else None

    def mean_loss(self, step: int) -> float | None:
        return None

    def squared_norm(self) -> float:
        return 0.0

    def update_with(self, step: int, norm: float) -> None:
        return None

    def begin_anew(self, recovery: Recovery, neighbours: Sequence[Neighbour]) -> None:
        return None

    def evaluate_whole(self, parts: list[Tensor]) -> dict[str, float]:
        return {}

    def _activations(self, stage: int) -> Tensor:
        return Phantom(torch.Size(self.cut.shape(stage)).numel())  # type: ignore[return-value]


def _room_bytes(cut: Cut, microbatches: int) -> int:
    """Return the bytes of a batch's microbatches in float32, and of the parameters that an evaluation takes."""
    return 4 * (microbatches + 1) * cut.largest
