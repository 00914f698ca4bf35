"""Local steps of several small replicas at once: a tiny model's step is mostly calls, which many replicas can share.

Gradients come from `torch.func`: the task's loss is mapped over the replicas' stacked parameters and batches. What that
comes to is traced once (`make_fx`), for the mapping itself costs more than it saves. Two things are mapped by hand, so
that bits stay those of a replica by itself and nothing is done one by one that need not be: attention, where replicas
become more rows of the batch, and a cross-entropy's mean, of which each has its own.
Whether it pays, and whether really no bit changes, is tried with the run's own model (`joined`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from decentral.inner import set_steps_of, state_of, steps_of
from decentral.replica import TorchReplica

SIZES = (16, 8, 4)
"""How many replicas compute together: each number is traced by itself."""
TRIAL_STEPS = 3
PAYS = 0.9
"""Share of the time of one after the other that it has to stay below."""


class Together:
    """Trains replicas of one run, of which `replica` is one, together."""

    def __init__(self, replica: TorchReplica) -> None:
        self._layout = replica.layout
        self._loss = _Loss(replica)
        self._traced: dict[Any, Callable[[Tensor, Any], tuple[Tensor, Tensor]]] = {}
        self._stacks: dict[int, _Stack] = {}

    def train(self, replicas: Sequence[TorchReplica], begun: Sequence[int], steps: int) -> list[Tensor]:
        """Do so many local steps of each replica, from its step in `begun` on; return each one's losses `[steps]`.

        Raises `TaskError` as `TorchReplica.train`; of losses that are not finite `TorchReplica.judged` tells.
        """
        stack = self._stacks.get(len(replicas))
        if stack is None:
            stack = self._stacks[len(replicas)] = _Stack(replicas[0], len(replicas))
        stack.take(replicas, begun)
        losses = []
        for at in range(steps):
            batches = [replica.batch(first + at) for replica, first in zip(replicas, begun, strict=True)]
            grads, own = self._gradients(stack.params, tree_map(lambda *each: torch.stack(each), *batches))
            losses.append(own)
            stack.step(grads, at)
        stack.give()
        return list(torch.stack(losses, dim=1))

    def _gradients(self, stacked: Tensor, batches: Any) -> tuple[Tensor, Tensor]:
        """Return the gradients `[k, P]` and losses `[k]` of replicas with these parameters `[k, P]`."""
        leaves, form = tree_flatten(batches)
        key = len(stacked), form, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        work = self._traced.get(key)
        if work is None:

            def mapped(stacked: Tensor, batches: Any) -> tuple[Tensor, Tensor]:
                return self._mapped(stacked, batches)  # who traces counts the arguments, of a method one too many

            work = self._traced[key] = make_fx(mapped)(stacked, batches)
        with torch.no_grad():
            return work(stacked, batches)

    def _mapped(self, stacked: Tensor, batches: Any) -> tuple[Tensor, Tensor]:
        """Return what `_gradients` does, by calls that can be traced."""
        named = {
            f"model.{entry.name}": stacked[:, entry.start : entry.stop].view(-1, *entry.shape)
            for entry in self._layout.entries
        }

        def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
            out: Tensor = functional_call(self._loss, params, (batch,))
            return out

        with _Mapped():
            grads, losses = vmap(grad_and_value(loss))(named, batches)
        return torch.cat([grads[name].flatten(1) for name in named], dim=1), losses


def joined(make: Callable[[int], TorchReplica], count: int) -> Together | None:
    """Return what trains so many replicas quicker than one after the other, to the same bits; None if nothing does.

    `make(worker)` makes one. For models that draw random numbers or keep statistics of batches nothing does.
    """
    apart, group = [make(worker) for worker in range(count)], [make(worker) for worker in range(count)]
    together = Together(group[0])
    try:
        together.train(group, [0] * count, 1)  # what is first asked for takes longer
        for replica in apart:
            replica.train(0, 1)
        began = time.perf_counter()
        losses = together.train(group, [1] * count, TRIAL_STEPS)
        between = time.perf_counter()
        ends = [replica.train(1, TRIAL_STEPS) for replica in apart]
        took, otherwise = between - began, time.perf_counter() - between
        told = [replica.judged(1, own) for replica, own in zip(group, losses, strict=True)]
    except Exception:  # what cannot be mapped says so in many ways, and is no error: it is done one by one
        return None
    same = all(one.params.equal(other.params) for one, other in zip(apart, group, strict=True))
    return together if same and told == ends and took < PAYS * otherwise else None


class _Stack:
    """So many replicas' parameters and what their inner optimisers keep, one below the other: `[k, P]` each.

    Replicas that are equally far in equal optimisers are stepped as one, the others row by row.
    """

    def __init__(self, replica: TorchReplica, count: int) -> None:
        self.params = replica.params.new_empty(count, replica.layout.size)
        matrices = replica.layout.matrices()
        self._whole = replica.inner.stacked(self.params, matrices)
        names = (*replica.inner.momenta, *replica.inner.variances)
        self._kept = {name: state_of(self._whole)[name].view_as(self.params) for name in names}
        self._rows = [replica.inner.fit(matrices).build(row) for row in self.params]
        for at, row in enumerate(self._rows):
            state_of(row).update({name: values[at] for name, values in self._kept.items()})
        self._grads = self.params
        self._replicas: Sequence[TorchReplica] = ()
        self._begun: Sequence[int] = ()
        self._alike = True

    def take(self, replicas: Sequence[TorchReplica], begun: Sequence[int]) -> None:
        """Copy these replicas here, which are at these local steps."""
        self._replicas, self._begun = replicas, begun
        for at, (replica, row) in enumerate(zip(replicas, self._rows, strict=True)):
            self.params[at].copy_(replica.params)
            for name, values in self._kept.items():
                values[at].copy_(replica.inner_state(name))
            set_steps_of(row, replica.inner_steps)
        first = replicas[0]
        standings = {(step, replica.inner_steps) for step, replica in zip(begun, replicas, strict=True)}
        self._alike = len(standings) == 1 and all(replica.inner == first.inner for replica in replicas)
        set_steps_of(self._whole, first.inner_steps)

    def step(self, grads: Tensor, after: int) -> None:
        """Take the step that is so many after the first one, along these gradients `[k, P]`, which may change."""
        self._grads, first = grads, self._replicas[0]
        if self._alike:
            first.inner.step_stacked(self._whole, grads, self._begun[0] + after, first.total_steps)
            return
        for at, (replica, row) in enumerate(zip(self._replicas, self._rows, strict=True)):
            row.param_groups[0]["params"][0].grad = grads[at]
            replica.inner.step(row, self._begun[at] + after, replica.total_steps)

    def give(self) -> None:
        """Copy everything back to the replicas that were taken, the last gradients too."""
        for at, (replica, row) in enumerate(zip(self._replicas, self._rows, strict=True)):
            replica.params.copy_(self.params[at])
            replica.grads.copy_(self._grads[at])
            for name, values in self._kept.items():
                replica.inner_state(name).copy_(values[at])
            replica.set_inner_steps(steps_of(self._whole if self._alike else row))


class _Loss(nn.Module):
    """A task's loss as a module's forward pass, so that parameters can be put in its model's place."""

    def __init__(self, replica: TorchReplica) -> None:
        super().__init__()
        self.model = copy.deepcopy(replica.model)
        self._task = replica.task

    def forward(self, batch: Any) -> Tensor:
        return self._task.loss(self.model, batch)


MEAN = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}
"""What `cross_entropy` is called with if nobody says otherwise."""


class _Mapped(TorchFunctionMode):
    """Has attention and cross-entropy go through the functions below, whose mapping is ours."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and set(kwargs) <= {"is_causal"} and len(args) == 3:
            causal = kwargs.get("is_causal", False)
            return _Attention.apply(*args, causal)[0]  # type: ignore[no-untyped-call]
        if function is F.cross_entropy and kwargs == MEAN and len(args) == 2 and args[0].dim() == 2:
            logs, targets = F.log_softmax(args[0], dim=1), args[1]
            return _MeanOf.apply(logs, targets)[0]  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)


def _rows(info: Any, in_dims: Sequence[int | None], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors `[k, B, ...]` as `[k B, ...]`."""
    rows = []
    for value, dim in zip(values, in_dims, strict=True):
        mapped = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        rows.append(mapped.flatten(0, 1))
    return rows


def _mapped(info: Any, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.unflatten(value, 0, (info.batch_size, -1)) for value in values)


class _Attention(torch.autograd.Function):
    """`scaled_dot_product_attention` without mask or dropout, as a CPU computes it: (out, log of the sums)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.causal = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grads = _AttentionBack.apply(grad, *ctx.saved_tensors, ctx.causal)  # type: ignore[no-untyped-call]
        return *grads, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, causal = inputs
        rows = _rows(info, in_dims[:-1], tensors)
        return _mapped(info, _Attention.apply(*rows, causal)), (0, 0)  # type: ignore[no-untyped-call]


class _AttentionBack(torch.autograd.Function):
    """The gradients of `_Attention` by q, k and v."""

    @staticmethod
    def forward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool
    ) -> tuple[Tensor, ...]:
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: tuple[Tensor, ...] = back(grad, q, k, v, out, sums, 0.0, causal)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nobody asks for second derivatives."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, causal = inputs
        rows = _rows(info, in_dims[:-1], tensors)
        return _mapped(info, _AttentionBack.apply(*rows, causal)), (0, 0, 0)  # type: ignore[no-untyped-call]


class _MeanOf(torch.autograd.Function):
    """`nll_loss` of log-probabilities `[n, classes]` and targets `[n]`: (mean, n)."""

    @staticmethod
    def forward(logs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.aten.nll_loss_forward(logs, targets, None, 1, -100)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        logs, targets, weight = ctx.saved_tensors
        return torch.ops.aten.nll_loss_backward(grad, logs, targets, None, 1, -100, weight), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        logs, targets = (value.movedim(dim, 0) for value, dim in zip(inputs, in_dims, strict=True))
        pairs = zip(logs, targets, strict=True)
        each = [_MeanOf.apply(*pair) for pair in pairs]  # type: ignore[no-untyped-call]
        return tuple(torch.stack(values) for values in zip(*each, strict=True)), (0, 0)
