"""A replica whose model trains on its device while anchors, outer state and messages stay in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from decentral.replica import Spans, TorchReplica, always


class OffloadedReplica(TorchReplica):
    """`params` and `grads`, and so every slot made of them, are host memory (pinned if the device is a GPU).

    The device holds the model and the inner optimiser alone. Parameters cross before and after each unit of local work,
    gradients as each fragment becomes final. The same bits as without it.
    """

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self._on_device = self.params
        self.params = self._host(self.params)
        self.grads = self._host(self.grads)

    def train(self, step: int, steps: int, goes_on: Callable[[], bool] = always) -> tuple[int, float]:
        self._on_device.copy_(self.params)
        done = super().train(step, steps, goes_on)
        self.params.copy_(self._on_device)
        return done

    def backward(
        self, step: int, fragments: Sequence[Spans], ready: Callable[[int], None], worker: int | None = None
    ) -> float:
        def crossed(index: int) -> None:
            for start, stop in fragments[index]:
                self.grads[start:stop].copy_(self._model_grads[start:stop])
            ready(index)

        self._on_device.copy_(self.params)
        return super().backward(step, fragments, crossed, worker)

    def update(self, step: int, norm: float | None = None) -> None:
        self._on_device.copy_(self.params)
        self._model_grads.copy_(self.grads)
        super().update(step, norm)
        self.params.copy_(self._on_device)

    def loss(self, step: int) -> float:
        self._on_device.copy_(self.params)
        return super().loss(step)

    def evaluate(self) -> dict[str, float]:
        self._on_device.copy_(self.params)
        return super().evaluate()

    def _host(self, values: Tensor) -> Tensor:
        host = torch.empty(values.shape, pin_memory=values.device.type == "cuda")
        return host.copy_(values)
