"""One worker's model and inner optimiser on flat buffers: the same steps, bit for bit, in both worlds."""

from __future__ import annotations

import hashlib
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from decentral.errors import ConfigError, Diverged, TaskError
from decentral.inner import Inner, set_steps_of, state_of, steps_of
from decentral.phantom import Phantom
from decentral.state import Layout, bind, layout_of
from decentral.task import Task, to_device

DIGEST_ROW = 1 << 14
"""Bytes whose order a digest does not see."""
LEASES_KEPT = 1024
"""Leases of which a replica knows the samples: estimating running statistics looks back over batches, nothing else."""

Spans = tuple[tuple[int, int], ...]
"""Parts of the flat vector: (start, stop) each."""


class BatchId(NamedTuple):
    """Names a batch: the one that `worker` trains on in its local step `step`."""

    worker: int
    step: int


def always() -> bool:
    return True


class Replica(Protocol):
    """What a `Peer` trains: real (`TorchReplica`) or, in timing-only mode, sizes alone (`PhantomReplica`).

    `expect_train` and `expect_backward` say that this very call comes next, and that nothing changes until then: who
    computes elsewhere may begin.
    """

    params: Tensor
    grads: Tensor
    layout: Layout
    batch_size: int

    @property
    def inner(self) -> Inner: ...
    def inner_state(self, name: str) -> Tensor: ...
    @property
    def inner_steps(self) -> int: ...
    def set_inner_steps(self, steps: int) -> None: ...
    def buffers(self) -> dict[str, Tensor]: ...
    def vector(self, size: int) -> Tensor: ...
    def set_learning_rate(self, lr: float) -> None: ...
    def new_slot(self, like: Tensor | None) -> Tensor: ...
    def abandon(self) -> None: ...
    def lease(self, step: int, start: int) -> None: ...
    def expect_train(self, step: int, steps: int) -> None: ...
    def train(self, step: int, steps: int, goes_on: Callable[[], bool] = always) -> tuple[int, float | None]: ...
    def expect_backward(self, step: int, fragments: Sequence[Spans], worker: int | None = None) -> None: ...
    def backward(
        self, step: int, fragments: Sequence[Spans], ready: Callable[[int], None], worker: int | None = None
    ) -> float | None: ...
    def update(self, step: int, norm: float | None = None) -> None: ...
    def loss(self, step: int) -> float: ...
    def evaluate(self) -> dict[str, float]: ...
    def statistics(self) -> Tensor: ...
    def set_statistics(self, values: Tensor) -> None: ...
    def estimate_statistics(self, step: int, batches: int) -> None: ...
    def digest(self) -> int: ...


def require_state(inner: Inner, name: str) -> None:
    """Raise `ConfigError` if the inner optimiser keeps no running mean of that name."""
    known = (*inner.momenta, *inner.variances)
    if name not in known:
        kept = f"keeps {', '.join(known)}" if known else "keeps no running means"
        raise ConfigError(f"inner: the rule needs the inner optimiser's '{name}', and '{inner.spelling()}' {kept}")


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on all parts and on nothing else (not on the process or the order of calls)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def initial_model(task: Task, seed: int) -> nn.Module:
    """Return the task's model as every worker of a run with this seed starts it; raises `TaskError`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        try:
            model = task.model()
        except Exception as error:
            raise TaskError(f"task.model() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"task.model() must return a torch.nn.Module, not {type(model).__name__}")
    return model


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of the model's state dict that are no parameters, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: values
        for name, values in model.state_dict().items()
        if isinstance(values, Tensor) and name not in parameters
    }


def begin_draws(device: torch.device, *parts: object) -> None:
    """Have torch's random numbers on the device depend on all parts, from here on, and on nothing else."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed_of(*parts))  # the general call formats a stack for each accelerator
    else:
        torch.manual_seed(seed_of(*parts))


class TorchReplica:
    """A model whose parameters are views of `params` `[P]`, its gradients of `grads` `[P]`, both float32.

    `storage` is where the parameters and the gradients shall live (memory that processes share), otherwise they get
    memory of their own. Every random draw of a step depends on (seed, worker, step) alone.
    """

    def __init__(
        self,
        task: Task,
        inner: Inner,
        *,
        worker: int,
        seed: int,
        batch_size: int,
        total_steps: int,
        device: torch.device | None = None,
        model: nn.Module | None = None,
        storage: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.task, self.inner, self.worker, self.seed = task, inner, worker, seed
        self.batch_size, self.total_steps = batch_size, total_steps
        self.model = (model or initial_model(task, seed)).to(self.device)
        self.layout = layout_of(self.model)
        size, device = self.layout.size, self.device
        self.params, self.grads = storage or (torch.zeros(size, device=device), torch.zeros(size, device=device))
        bind(self.model, self.layout, self.params, self.grads)
        self.model.train()
        self.optimizer = inner.fit(self.layout.matrices()).build(self.params)
        self.params.grad = self._model_grads = self.grads
        self.loading_s = 0.0
        """Seconds that getting batches has taken so far."""
        self._leases: list[tuple[int, int]] = []  # (first local step, first sample), ascending
        self._readiness = _Readiness(self.model, self.layout)
        self._norms = norms_of(self.model)

    def inner_state(self, name: str) -> Tensor:
        """Return a live part of the inner optimiser's state, `[P]` where the model is; zeros before the first step."""
        require_state(self.inner, name)
        state: Tensor = state_of(self.optimizer)[name]
        return state

    @property
    def inner_steps(self) -> int:
        """Steps that the inner optimiser believes it has done; 0 if it does not count them."""
        return steps_of(self.optimizer)

    def set_inner_steps(self, steps: int) -> None:
        """Have the inner optimiser believe that it has done so many steps, as its bias corrections go by them."""
        set_steps_of(self.optimizer, steps)

    def buffers(self) -> dict[str, Tensor]:
        """Return the live tensors of the model's state dict that are no parameters, by name: running statistics, ..."""
        return buffers_of(self.model)

    def vector(self, size: int) -> Tensor:
        """Return a new vector of that length on the device of `params`, with any contents."""
        return self.params.new_empty(size)

    def set_learning_rate(self, lr: float) -> None:
        """Take `lr` for the inner optimiser's peak from the next step on."""
        self.inner = self.inner.model_copy(update={"lr": lr})

    def new_slot(self, like: Tensor | None) -> Tensor:
        return torch.zeros_like(self.params) if like is None else like.detach().clone()

    def move_state(self, copy_of: Callable[[Tensor], Tensor]) -> None:
        """Put the model's buffers and the inner optimiser's tensors where `copy_of` makes copies of them."""
        for buffer in self.model.buffers():
            buffer.data = copy_of(buffer)
        for state in self.optimizer.state.values():
            state.update({name: copy_of(value) for name, value in state.items() if isinstance(value, Tensor)})

    def abandon(self) -> None:
        """Nothing is under way that must end before the state is somebody else's."""

    def lease(self, step: int, start: int) -> None:
        """From local step `step` on train on the samples from `start` on of the stream that all workers share.

        That is worker 0's. Without a lease a worker trains on its own stream.
        """
        while self._leases and self._leases[-1][0] >= step:
            self._leases.pop()
        self._leases.append((step, start))
        del self._leases[:-LEASES_KEPT]

    def expect_train(self, step: int, steps: int) -> None:
        """Nothing begins before it is asked for."""

    def train(self, step: int, steps: int, goes_on: Callable[[], bool] = always) -> tuple[int, float]:
        """Do local steps `step .. step + steps - 1`; return how many were done and their mean loss.

        `goes_on` is asked after each step but the last whether to do the next one. Raises `Diverged` if a loss is not
        finite.
        """
        losses: list[Tensor] = []
        for at in range(step, step + steps):
            if losses and not goes_on():
                break
            losses.append(self._gradient(at))
            self.inner.step(self.optimizer, at, self.total_steps)
        return self.judged(step, torch.stack(losses))

    def judged(self, step: int, values: Tensor) -> tuple[int, float]:
        """Return how many losses of local steps from `step` on these are, and their mean. `Diverged` as `train`."""
        if not bool(torch.isfinite(values).all()):
            first = int((~torch.isfinite(values)).nonzero()[0])
            raise Diverged(
                f"worker {self.worker}: the loss of local step {step + first} is {values[first].item()}; "
                "lower inner.lr, set inner.clip_norm, or look at the batch of that step"
            )
        return len(values), float(values.mean())

    def batch(self, step: int, worker: int | None = None) -> Any:
        """Return the batch of local step `step`, ours or another worker's, with whose random draws the step begins.

        Raises `TaskError` when the task raises.
        """
        worker = self.worker if worker is None else worker
        begin_draws(self.device, self.seed, "step", worker, step)
        with self._of_the_task(step):
            stream, start = self._samples_of(worker, step)
            began = time.perf_counter()
            batch = self.task.batch(stream, start, self.batch_size)
            self.loading_s += time.perf_counter() - began
            return to_device(batch, self.device)

    def expect_backward(self, step: int, fragments: Sequence[Spans], worker: int | None = None) -> None:
        """Nothing begins before it is asked for."""

    def backward(
        self, step: int, fragments: Sequence[Spans], ready: Callable[[int], None], worker: int | None = None
    ) -> float:
        """Fill `grads` with the gradient of step `step`, calling `ready(i)` as soon as all of fragment i is final.

        The batch is our own, or that of another `worker`, with whose random draws it is the gradient that one has at
        equal parameters.
        """
        with self._readiness.watch(fragments, ready):
            loss = float(self._gradient(step, worker))
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise Diverged(f"worker {self.worker}: the loss of local step {step} is {loss}")
        return loss

    def update(self, step: int, norm: float | None = None) -> None:
        """One step of the inner optimiser on `grads`; it clips by `norm` if they are a part of the whole gradient."""
        self.inner.step(self.optimizer, step, self.total_steps, norm)

    def loss(self, step: int) -> float:
        """Return the loss on step `step`'s batch at the current parameters, without a gradient."""
        with torch.no_grad():
            return float(self._forward(step))

    def evaluate(self) -> dict[str, float]:
        """Return the task's held-out metrics at the current parameters."""
        return evaluate(self.task, self.model)

    def statistics(self) -> Tensor:
        """Return the running means of all batch normalisations, then their running variances: `[S]` float32, a copy."""
        return statistics_of(self._norms)

    def set_statistics(self, values: Tensor) -> None:
        """Take over what `statistics` returned, here or elsewhere. Counters of batches stay what they are."""
        set_statistics_of(self._norms, values)

    def estimate_statistics(self, step: int, batches: int) -> None:
        """Replace the running statistics by their means over the last `batches` batches before `step`.

        At the current parameters, all but the batch normalisations in eval mode, without a gradient.
        """
        kept = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in self._norms]
        self.model.eval()
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over all batches
            norm.train()
        try:
            for at in range(max(0, step - batches), max(step, 1)):
                self.loss(at)
        finally:
            for norm, (momentum, counted) in zip(self._norms, kept, strict=True):
                norm.momentum = momentum
                norm.get_buffer("num_batches_tracked").copy_(counted)
            self.model.train()

    def digest(self) -> int:
        """Return a checksum of the parameters' bytes."""
        return digest([self.params])

    def _samples_of(self, worker: int, step: int) -> tuple[int, int]:
        """Return the stream (a worker's number) and the first sample of a local step of `worker`."""
        if worker == self.worker and self._leases:
            place = bisect_right(self._leases, step, key=itemgetter(0))
            if place:
                since, start = self._leases[place - 1]
                return 0, start + (step - since) * self.batch_size
        return worker, step * self.batch_size

    def _gradient(self, step: int, worker: int | None = None) -> Tensor:
        self._model_grads.zero_()
        loss = self._forward(step, worker)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _forward(self, step: int, worker: int | None = None) -> Tensor:
        batch = self.batch(step, worker)
        with self._of_the_task(step):
            return self.task.loss(self.model, batch)

    @contextmanager
    def _of_the_task(self, step: int) -> Iterator[None]:
        """Say of the task's errors whose they are."""
        try:
            yield
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                f"worker {self.worker}: the task raised at local step {step}: {type(error).__name__}: {error}"
            ) from error


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations of the model that keep running statistics, in its order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def statistics_of(norms: Sequence[_BatchNorm]) -> Tensor:
    """Return their running means, then their running variances: `[S]` float32, a copy; empty if there are none."""
    running = _running(norms)
    return torch.cat(running).cpu() if running else torch.empty(0)


def set_statistics_of(norms: Sequence[_BatchNorm], values: Tensor) -> None:
    """Have them take over what `statistics_of` returned. Counters of batches stay what they are."""
    place = 0
    for buffer in _running(norms):
        buffer.copy_(values[place : place + buffer.numel()])
        place += buffer.numel()


def _running(norms: Sequence[_BatchNorm]) -> list[Tensor]:
    return [norm.get_buffer(name) for name in ("running_mean", "running_var") for norm in norms]


def evaluate(task: Task, model: nn.Module) -> dict[str, float]:
    """Return `task.evaluate(model)` in eval mode and without gradients; the model's mode is restored. `TaskError`."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            metrics = {name: float(value) for name, value in task.evaluate(model).items()}
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"task.evaluate() raised {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    if task.headline not in metrics or "loss" not in metrics:
        raise TaskError(f"task.evaluate() returned {sorted(metrics)}; 'loss' and '{task.headline}' must be among them")
    return metrics


def held_out(task: Task, seed: int, params: Tensor | None = None) -> dict[str, float]:
    """Return the held-out metrics of the model at `params` `[P]`, or as a run with this seed starts it. `TaskError`."""
    model = initial_model(task, seed)
    if params is not None:
        load_params(model, params)
    return evaluate(task, model)


def load_params(model: nn.Module, params: Tensor) -> None:
    """Give the model the parameters of a flat vector `[P]`."""
    layout = layout_of(model)
    flat = torch.empty(layout.size)
    bind(model, layout, flat, torch.zeros(layout.size))
    flat.copy_(params)


def digest(values: Sequence[Tensor]) -> int:
    """Return a checksum of the values' bytes, in order; 0 for phantoms. Finds accidental divergence, not forgery.

    Bytes are added up as 64-bit words, row by row, at the speed of memory, and the rows' sums go into a CRC. What lies
    behind the last whole row goes into the CRC as it is.
    """
    checksum = 0
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().view(-1).view(torch.uint8)
            if flat.storage_offset() % 8:
                flat = flat.clone()  # 64-bit words must be aligned
            whole = flat.numel() // DIGEST_ROW * DIGEST_ROW
            sums = flat[:whole].view(torch.int64).view(-1, DIGEST_ROW // 8).sum(dim=1)
            for part in (sums.view(torch.uint8), flat[whole:]):
                checksum = zlib.crc32(part.cpu().numpy().data, checksum)
    return checksum


class _Readiness:
    """Tells when the gradient of a fragment is final, by counting the parameters whose gradients have been added."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model, self._layout, self._hooked = model, layout, False
        self._left: list[int] = []
        self._fragments_of: dict[str, list[int]] = {}
        self._ready: Callable[[int], None] | None = None

    def watch(self, fragments: Sequence[Spans], ready: Callable[[int], None]) -> _Readiness:
        if not self._hooked:
            named = dict(self._model.named_parameters())
            for entry in self._layout.entries:
                named[entry.name].register_post_accumulate_grad_hook(self._hook(entry.name))  # type: ignore[no-untyped-call]
            self._hooked = True
        self._ready = ready
        self._left = [0] * len(fragments)
        self._fragments_of = {entry.name: [] for entry in self._layout.entries}
        for entry in self._layout.entries:
            for index, spans in enumerate(fragments):
                if any(start < entry.stop and entry.start < stop for start, stop in spans):
                    self._fragments_of[entry.name].append(index)
                    self._left[index] += 1
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_rest: object) -> None:
        """A parameter the loss did not reach has gradient zero, which is final too; so is an empty fragment."""
        ready, self._ready = self._ready, None
        if kind is None and ready is not None:
            for index, left in enumerate(self._left):
                if left >= 0:
                    ready(index)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def count(_parameter: Tensor) -> None:
            if self._ready is None:
                return
            for index in self._fragments_of[name]:
                self._left[index] -= 1
                if self._left[index] == 0:
                    self._left[index] = -1  # told
                    self._ready(index)

        return count


class PhantomReplica:
    """A replica of `layout` without elements, for timing-only simulation."""

    def __init__(self, layout: Layout, batch_size: int, inner: Inner) -> None:
        self.layout = layout
        self.batch_size = batch_size
        self.inner = inner
        self.params: Tensor = Phantom(layout.size)  # type: ignore[assignment]
        self.grads: Tensor = Phantom(layout.size)  # type: ignore[assignment]

    def inner_state(self, name: str) -> Tensor:
        require_state(self.inner, name)
        return self.params

    @property
    def inner_steps(self) -> int:
        return 0

    def set_inner_steps(self, steps: int) -> None:
        return None

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def vector(self, size: int) -> Tensor:
        return Phantom(size)  # type: ignore[return-value]

    def set_learning_rate(self, lr: float) -> None:
        self.inner = self.inner.model_copy(update={"lr": lr})

    def new_slot(self, like: Tensor | None) -> Tensor:
        return self.params if like is None else like

    def abandon(self) -> None:
        return None

    def lease(self, step: int, start: int) -> None:
        return None

    def expect_train(self, step: int, steps: int) -> None:
        return None

    def train(self, step: int, steps: int, goes_on: Callable[[], bool] = always) -> tuple[int, None]:
        return steps, None

    def expect_backward(self, step: int, fragments: Sequence[Spans], worker: int | None = None) -> None:
        return None

    def backward(
        self, step: int, fragments: Sequence[Spans], ready: Callable[[int], None], worker: int | None = None
    ) -> None:
        for index in reversed(range(len(fragments))):
            ready(index)

    def update(self, step: int, norm: float | None = None) -> None:
        return None

    def loss(self, step: int) -> float:
        return 0.0

    def evaluate(self) -> dict[str, float]:
        return {}

    def statistics(self) -> Tensor:
        return torch.empty(0)

    def set_statistics(self, values: Tensor) -> None:
        return None

    def estimate_statistics(self, step: int, batches: int) -> None:
        return None

    def digest(self) -> int:
        return 0
