"""A replica whose work another process does, on parameters that both see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from decentral.errors import DecentralError
from decentral.replica import Spans, TorchReplica, always
from decentral.sim.engine.pool import Call, Pool


class PooledReplica:
    """Stands in for `local`, whose tensors lie in an `Arena`: looks at them here and has the pool change them.

    Work that is expected is computed while the simulation goes on, so that phases which overlap in virtual time are
    computed side by side. Who changes the parameters meanwhile breaks the promise of `Peer.params`: RuntimeError.
    """

    def __init__(self, local: TorchReplica, pool: Pool) -> None:
        self._local, self._pool = local, pool
        self._begun: _Begun | None = None
        self.params, self.grads, self.layout = local.params, local.grads, local.layout
        self.batch_size, self.inner = local.batch_size, local.inner

    def inner_state(self, name: str) -> Tensor:
        return self._local.inner_state(name)

    def set_learning_rate(self, lr: float) -> None:
        self._do(TorchReplica.set_learning_rate, lr)
        self.inner = self.inner.model_copy(update={"lr": lr})

    @property
    def inner_steps(self) -> int:
        return int(self._do(_inner_steps))

    def set_inner_steps(self, steps: int) -> None:
        self._do(TorchReplica.set_inner_steps, steps)

    def buffers(self) -> dict[str, Tensor]:
        return self._local.buffers()

    def vector(self, size: int) -> Tensor:
        return self._local.vector(size)

    def new_slot(self, like: Tensor | None) -> Tensor:
        return self._local.new_slot(like)

    def abandon(self) -> None:
        """Forget what a life has begun and nobody wants any more, as soon as it can do no harm."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            with suppress(DecentralError):
                begun.call.result()

    def lease(self, step: int, start: int) -> None:
        self._pool.submit(self._local.worker, TorchReplica.lease, step, start)

    def expect_train(self, step: int, steps: int) -> None:
        self._begin(TorchReplica.train, step, steps)

    def train(self, step: int, steps: int, goes_on: Callable[[], bool] = always) -> tuple[int, float]:
        """Do all of these steps: in virtual time it is known beforehand how many there are."""
        done: tuple[int, float] = self._do(TorchReplica.train, step, steps)
        return done

    def expect_backward(self, step: int, fragments: Sequence[Spans], worker: int | None = None) -> None:
        self._begin(_backward, step, tuple(fragments), worker)

    def backward(
        self, step: int, fragments: Sequence[Spans], ready: Callable[[int], None], worker: int | None = None
    ) -> float:
        loss, order = self._do(_backward, step, tuple(fragments), worker)
        for index in order:
            ready(index)
        return float(loss)

    def update(self, step: int, norm: float | None = None) -> None:
        self._do(TorchReplica.update, step, norm)

    def loss(self, step: int) -> float:
        return float(self._do(TorchReplica.loss, step))

    def evaluate(self) -> dict[str, float]:
        metrics: dict[str, float] = self._do(TorchReplica.evaluate)
        return metrics

    def statistics(self) -> Tensor:
        return self._local.statistics()

    def set_statistics(self, values: Tensor) -> None:
        self._local.set_statistics(values)

    def estimate_statistics(self, step: int, batches: int) -> None:
        self._do(TorchReplica.estimate_statistics, step, batches)

    def digest(self) -> int:
        return self._local.digest()

    def _begin(self, work: Callable[..., Any], *args: Any) -> None:
        call = self._pool.submit(self._local.worker, work, *args)
        self._begun = _Begun(call, (work, *args), self.params._version)

    def _do(self, work: Callable[..., Any], *args: Any) -> Any:
        """Return what the work comes to, begun before if it was expected."""
        if self._begun is None:
            return self._pool.submit(self._local.worker, work, *args).result()
        begun, self._begun = self._begun, None
        result = begun.call.result()
        if begun.order != (work, *args) or begun.version != self.params._version:
            raise RuntimeError(
                f"worker {self._local.worker}: its parameters were changed, or other work asked for, while it trained"
            )
        return result


class _Begun(NamedTuple):
    """Work under way, what was asked for, and the version of the parameters then."""

    call: Call
    order: tuple[Any, ...]
    version: int


def _inner_steps(replica: TorchReplica) -> int:
    return replica.inner_steps


def _backward(
    replica: TorchReplica, step: int, fragments: Sequence[Spans], worker: int | None
) -> tuple[float, list[int]]:
    """Return the loss, and the fragments in the order in which they became final."""
    order: list[int] = []
    return replica.backward(step, fragments, order.append, worker), order
